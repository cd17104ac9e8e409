"""A disk, a quota or a file server that gives way in the middle of a save. `make test-slow`.

The faults are real for the program: a small library stands before the C library and lets one
call fail for the checkpoint's temporary file.
"""

import errno
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from helpers.kill_driver import same, state
from helpers.small_runs import SMALL, shell

pytestmark = [
    pytest.mark.faults,
    pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler"),
]

SOURCE = Path(__file__).parents[1] / "helpers" / "failing_disk.c"
START = f"$PY main.py {' '.join(map(str, SMALL))} --epochs 1 --output"
GO_ON = "$PY main.py --resume auto --output run --epochs 2"
STORAGE = "what was written before it is whole. See to the storage, and start again"
ROOM = "Make room, and resume"


@pytest.fixture(scope="module")
def failing_disk(tmp_path_factory) -> Path:
    library = tmp_path_factory.mktemp("disk") / "failing_disk.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, SOURCE, "-ldl"], check=True)
    return library


@pytest.fixture(scope="module")
def undisturbed(tree, tmp_path_factory) -> Path:
    """A run that nothing disturbs, as it is after each of its epochs: one/, two/."""
    folder = tmp_path_factory.mktemp("undisturbed")
    for line in (f"{START} one {tree}", f"cp -r one two; {GO_ON.replace('run', 'two')}"):
        done = shell(folder, line)
        assert (done.returncode, done.stderr) == (0, "")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.pth")}


def let_fail(library: Path, name: str, call: str, number: int) -> dict[str, str]:
    return {
        "LD_PRELOAD": str(library),
        "FAIL_NAME": f".{name}.tmp",
        "FAIL_CALL": call,
        "FAIL_ERRNO": str(number),
    }


@pytest.mark.parametrize(
    ("call", "number", "said"),
    [
        ("write", errno.EIO, STORAGE),
        ("fsync", errno.EIO, STORAGE),
        ("close", errno.ESTALE, STORAGE),
        ("rename", errno.EIO, STORAGE),
        ("write", errno.EDQUOT, ROOM),
        ("fsync", errno.EDQUOT, ROOM),  # a file server says it late
        ("close", errno.ENOSPC, ROOM),
    ],
)
def test_a_save_that_fails(failing_disk, undisturbed, tmp_path, call, number, said):
    run = shutil.copytree(undisturbed / "one", tmp_path / "run")
    before = contents(run)
    done = shell(tmp_path, GO_ON, **let_fail(failing_disk, "last.pth", call, number))
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert re.search(f"write run/last.pth.*{os.strerror(number)}.*{said}", done.stderr)
    assert not list(run.glob(".*tmp*"))
    assert contents(run) == before

    done = shell(tmp_path, GO_ON)
    assert (done.returncode, done.stderr) == (0, "")
    assert same(state(run), state(undisturbed / "two"))


@pytest.mark.parametrize(("call", "number"), [("write", errno.EIO), ("fsync", errno.EDQUOT)])
def test_a_best_checkpoint_that_cannot_be_saved(
    failing_disk, undisturbed, tree, tmp_path, call, number
):
    broken = let_fail(failing_disk, "best.pth", call, number)
    done = shell(tmp_path, f"{START} run {tree}", **broken)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert re.search(f"write run/best.pth.*{os.strerror(number)}", done.stderr)
    done = shell(tmp_path, GO_ON)
    assert (done.returncode, done.stderr) == (0, "")
    assert same(state(tmp_path / "run"), state(undisturbed / "two"))
