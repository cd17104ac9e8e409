"""Small image trees, and scripts run the way a user runs them."""

import contextlib
import errno
import gc
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from multiprocessing.connection import wait
from pathlib import Path

# First, for the loaders' sake: what it keeps of its import holds every frame above that import, and
# a frame of training holds loaders, whose workers hear of their end when they are freed in order.
import matplotlib.pyplot  # noqa: F401
import numpy as np
import pytest
import torch
from helpers.small_runs import BEFORE, SMALL, Running, draw_nothing, own_children, thin_networks
from helpers.trees import ROOT, write_tree
from PIL import Image


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    """Says how many tests injected faults, and how many kills were compared, after `-m faults`."""
    if "faults" in config.option.markexpr and "not faults" not in config.option.markexpr:
        passed, failed = (
            [test for test in terminalreporter.stats.get(k, []) if "faults" in test.keywords]
            for k in ("passed", "failed")
        )
        kills = sum(n for test in passed for key, n in test.user_properties if key == "kills")
        terminalreporter.write_line(
            f"faults injected by {len(passed) + len(failed)} tests, {len(failed)} failed; "
            f"{kills} kills resumed and compared, bit for bit"
        )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks the tests of two folders as slow: one builds wheels, one runs every benchmark."""
    for item in items:
        if item.path.relative_to(ROOT / "tests").parts[0] in ("package", "benchmarks"):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session", autouse=True)
def temporary_files() -> Iterator[None]:
    """One folder for them all: what is killed here does not clear up after itself."""
    with (
        tempfile.TemporaryDirectory(prefix="eca-", ignore_cleanup_errors=True) as folder,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setenv("TMPDIR", folder)
        patch.setattr(tempfile, "tempdir", folder)
        yield


@pytest.fixture(scope="session", autouse=True)
def signals() -> None:
    """What scripts inherit: under `nohup`, or behind a shell's `&`, they would ignore these."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def children(request: pytest.FixtureRequest) -> Iterator[None]:
    """No test leaves processes to those after it, which would wait for them or count them."""
    BEFORE.clear()
    BEFORE.update(multiprocessing.active_children())
    yield
    if own_children():  # loader workers end with the loader
        gc.collect()
    for child in own_children():  # those of a pool, when they hear of its end
        wait([child.sentinel], 60)
    left = own_children()
    for child in left:  # a failed test's traceback holds on to its loader
        child.kill()
    assert left == [], f"{request.node.nodeid} leaves processes behind"


@pytest.fixture
def bad_sector(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Lets opening files whose names end so fail, as on a bad disk; all others are as ever.

    Also those of whoever removes the test's folder, which opens files by `dir_fd`.
    """

    def at(ending: bytes, number: int = errno.EIO) -> None:
        real = os.open

        def fail(path, *arguments, **options):
            if isinstance(path, str | bytes) and os.fsencode(path).endswith(ending):
                raise OSError(number, os.strerror(number), path)
            return real(path, *arguments, **options)

        monkeypatch.setattr(os, "open", fail)

    return at


@pytest.fixture(scope="session")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 training and 15 validation images of three classes. Read only."""
    return write_tree(tmp_path_factory.mktemp("tree"))


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Four images of several shapes and one broken file."""
    folder = tmp_path / "photos"
    (folder / "cat" / ".hidden").mkdir(parents=True)
    chance = np.random.default_rng(0)
    shapes = {"a.png": (50, 90), "b.jpg": (90, 50), "cat/c.png": (70, 70), "cat/d[1].png": (33, 80)}
    for name, shape in shapes.items():
        pixels = chance.integers(0, 256, (*(side // 8 + 1 for side in shape), 3), np.uint8)
        Image.fromarray(pixels).resize(shape[::-1], Image.Resampling.BICUBIC).save(folder / name)
    (folder / "bad.png").write_bytes(b"no image")
    (folder / "cat" / ".hidden" / "e.png").write_bytes(b"")
    (folder / "notes.txt").write_text("not an image")
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess]:
    """Runs `python SCRIPT ARGUMENTS…` in an empty folder and returns what it printed."""

    def start(script: str, *arguments: object, ranks: int = 0) -> subprocess.CompletedProcess:
        launcher = [sys.executable]
        if ranks:
            launcher += ["-m", "torch.distributed.run", f"--nproc-per-node={ranks}"]
            launcher += ["--master-port=0", "--standalone"]
        return subprocess.run(
            [*launcher, str(ROOT / script), *map(str, arguments)],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=3000,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    return start


@pytest.fixture
def call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> Iterator[Callable[..., tuple[int, list[str], list[str]]]]:
    """main.py's main in this process: (exit code, lines on stdout, lines on stderr)."""
    import main as script
    from utils.runs import writer
    from utils.system import faults

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(writer, "draw_curves", draw_nothing)
    monkeypatch.setattr(faults, "end_children", lambda: True)

    def start(*arguments, entry=script.main):
        monkeypatch.setattr(sys, "argv", ["main.py", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            faults.run_script(entry)
        out, err = capfd.readouterr()
        return ended.value.code, out.splitlines(), err.splitlines()

    yield start
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Running]]:
    """Starts main.py (or torchrun with `ranks`) with arguments; kills it after the test."""
    started = []

    def begin(*arguments, ranks: int = 0, **options) -> Running:
        launcher = []
        if ranks:
            launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        started.append(Running(tmp_path, *launcher, ROOT / "main.py", *arguments, **options))
        return started[-1]

    yield begin
    for running in started:
        with contextlib.suppress(OSError):
            os.killpg(running.process.pid, signal.SIGKILL)
        running.process.wait()


@pytest.fixture
def thin() -> Iterator[None]:
    """`thin_networks` during a test: what it trains in this process."""
    with thin_networks():
        yield


@pytest.fixture(scope="session")
def two_epochs(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of main.py over two epochs. Read only: copy it."""
    import main as script

    folder = tmp_path_factory.mktemp("finished") / "run"
    with pytest.MonkeyPatch.context() as patch, thin_networks():
        words = ("main.py", *SMALL, "--epochs", 2, "--output", folder, tree)
        patch.setattr(sys, "argv", list(map(str, words)))
        assert script.main() == 0
    torch.use_deterministic_algorithms(False)
    return folder


@pytest.fixture
def run_folder(two_epochs: Path, tmp_path: Path) -> Path:
    """A copy of `two_epochs`."""
    return Path(shutil.copytree(two_epochs, tmp_path / "run"))


@pytest.fixture(scope="session")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """13 training and 5 validation images of 64 pixels, in COCO's layout. Read only."""
    from utils.data.demo_shapes import write_shapes

    folder = tmp_path_factory.mktemp("shapes")
    write_shapes(folder, {"train": 13, "val": 5}, side=64)
    return folder


@pytest.fixture
def detect(
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capfd: pytest.CaptureFixture,
) -> Iterator[Callable[..., list[str]]]:
    """detect_main.py's main in this process, in an empty folder: lines on stdout.

    With `thin` its heads are narrow, too.
    """
    import detect_main as script
    from utils.runs import writer

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(writer, "draw_curves", draw_nothing)
    if "thin" in request.fixturenames:
        narrow = script.RECIPE.override(settings={"width": 16})
        monkeypatch.setattr(script, "RECIPE", narrow)

    def start(*arguments: object, code: int = 0) -> list[str]:
        monkeypatch.setattr(sys, "argv", ["detect_main.py", *map(str, arguments)])
        capfd.readouterr()
        assert script.main() == code
        return capfd.readouterr().out.splitlines()

    yield start
    torch.use_deterministic_algorithms(False)  # which --seed turned on, in this process too


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> Iterator[list]:
    """The matplotlib figures that are made into files meanwhile, to see what they show."""
    from utils.system import style

    kept = []
    with monkeypatch.context() as patch:
        patch.setattr(style, "release", kept.append)
        yield kept
    for figure in kept:
        style.release(figure)


@pytest.fixture
def seeded() -> None:
    """The same chance in every test."""
    torch.manual_seed(0)


@pytest.fixture
def operations(monkeypatch: pytest.MonkeyPatch) -> None:
    """The formulas in PyTorch's operations, in every dtype; compiled ones have their own tests."""
    from models.fused import block_tail, cpu_passes

    monkeypatch.setattr(cpu_passes, "serves", lambda z: False)
    monkeypatch.setattr(block_tail, "_has_passes", lambda z: True)


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine without a C++ compiler."""
    from models.fused import cpu_passes

    monkeypatch.setattr(cpu_passes, "why_not", lambda *_: "no C++ compiler")
    monkeypatch.setattr(cpu_passes, "serves", lambda z: False)
