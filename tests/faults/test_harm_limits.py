"""What a run wants and cannot have: memory, room on a disk, a folder, or one for itself alone.

All of it is real, as in test_harm.py. `make test-slow`.
"""

import re
import resource
import signal

import pytest
from helpers.small_runs import LONG, PATIENCE, SMALL, Running, progress
from helpers.trees import ROOT

pytestmark = pytest.mark.faults


def test_two_runs_in_one_folder(start, tree, tmp_path):
    first = start(*LONG, "--output", "run", tree)
    first.wait_for("epoch 2/500  step 1/4")
    second = Running(tmp_path, ROOT / "main.py", "--resume", "auto", "--output", tmp_path / "run")
    code, _, err = second.end()
    assert code == 1
    assert len(err) == 1
    assert "run: another process is training in this folder; wait for it to end" in err[0]
    assert first.process.poll() is None  # and undisturbed
    first.process.send_signal(signal.SIGTERM)
    assert first.process.wait(PATIENCE) == 143


def test_two_fresh_runs_started_at_once(tree, tmp_path):
    """One trains; the other ends with a line, whichever of them comes first."""
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
    runs = [
        Running(folder, ROOT / "main.py", *SMALL, "--epochs", 1, "--output", tmp_path / "run", tree)
        for folder in folders
    ]
    (code, out, err), (_, _, other) = sorted((run.end() for run in runs), key=lambda end: end[2])
    assert (code, err) == (0, [])
    assert any(line.startswith("done: ") for line in out)
    assert len(other) == 1
    assert re.search("another process is training in this folder|run: is in use", other[0])
    assert progress(tmp_path / "run")["epoch"] == 1


def test_no_memory(start, tree, tmp_path):
    def little_memory():
        resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))

    flags = (*SMALL, "-b", 24, "--img-size", 2000, "--epochs", 1, "--output", "run", tree)
    running = start(*flags, preexec_fn=little_memory)
    code, _, err = running.end()
    assert code == 1
    assert err == ["error: out of memory: give a smaller -b or --img-size, or --amp bf16"]


def test_a_full_disk(start, tree, tmp_path):
    """No file may grow beyond a limit, which a process meets as it meets a full disk."""
    first = start(*SMALL, "--epochs", 1, "--output", "run", tree)
    assert first.end()[0] == 0
    before = {p.name: p.read_bytes() for p in (tmp_path / "run").glob("*.pth")}

    def little_room():
        resource.setrlimit(resource.RLIMIT_FSIZE, (4 << 20, 4 << 20))

    again = start("--resume", "auto", "--output", "run", "--epochs", 2, preexec_fn=little_room)
    code, _, err = again.end()
    assert code == 1
    assert len(err) == 1
    assert re.match(
        r"error: no room to write run/last.pth .*: [\d.]+ MB needed, .* free; what was "
        "written before it is whole. Make room, and resume$",
        err[0],
    )
    assert {p.name: p.read_bytes() for p in (tmp_path / "run").glob("*.pth")} == before
    assert not list((tmp_path / "run").glob("*tmp*"))
    last = start("--resume", "auto", "--output", "run", "--epochs", 2)
    assert last.end()[0] == 0
