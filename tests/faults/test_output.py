"""Outputs that are closed, full or have no reader, and logs that cannot be written.

A training run goes on and saves; other programs end with one line. `make test-slow`.
"""

import re
from pathlib import Path

import pytest
from helpers.small_runs import SMALL, Running, progress, shell
from helpers.trees import ROOT

pytestmark = pytest.mark.faults

TRAIN = f"$PY main.py {' '.join(map(str, SMALL))} --epochs 1 --output run"
RUN = {"args.json", "batch.png", "best.pth", "curves.png", "last.pth", "metrics.csv"}
RUN |= {"predictions.png", "previous.pth"}


def assert_whole(folder: Path, epochs: int = 1) -> None:
    names = {path.name for path in folder.iterdir() if not path.name.startswith(("events", "."))}
    assert names == RUN
    assert progress(folder)["epoch"] == epochs
    assert progress(folder, "best.pth")["epoch"] > 0


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("> /dev/full", ["! stdout: No space left on device; what follows is not shown"]),
        (">&-", []),
        ("2>&-", []),
        ("> /dev/full 2>&1", []),
        ("-j 2 >&- 2>&- <&-", []),
    ],
)
def test_training_goes_on_without_its_outputs(tree, tmp_path, how, said):
    done = shell(tmp_path, f"{TRAIN} {tree} {how}")
    assert (done.returncode, done.stderr.splitlines()) == (0, said)
    assert_whole(tmp_path / "run")


def test_training_goes_on_when_nobody_reads(tree, tmp_path):
    """As with `| head -1`; also when it goes on with a run, whose first line comes early."""
    for epochs in (1, 2):
        line = f"set -o pipefail; {TRAIN} --epochs {epochs} --resume auto {tree} | (read x)"
        done = shell(tmp_path, line)
        assert done.returncode == 0
        assert done.stderr == "! stdout: Broken pipe; what follows is not shown\n"
        assert_whole(tmp_path / "run", epochs)


@pytest.mark.parametrize(
    "script", ["predict.py CKPT DATA/val", "main.py -e --resume CKPT DATA", "main.py -h"]
)
def test_other_scripts_end_without_a_traceback(run_folder, tree, tmp_path, script):
    line = script.replace("CKPT", f"{run_folder}/best.pth").replace("DATA", str(tree))
    done = shell(tmp_path, f"$PY {line} > /dev/full")
    lost = "error: No space left on device; make room"
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == lost
    for how in (">&- 2>&-", "| (exit 0)"):
        done = shell(tmp_path, f"$PY {line} {how}")
        assert done.returncode == 0
        assert "Traceback" not in done.stderr
        assert "error" not in done.stderr


def test_full_disks_under_the_logs(tree, tmp_path):
    """TensorBoard opens its file again for each write: a link to /dev/full is a full disk to it.

    The other logs are replaced by renaming, which a folder under their name hinders.
    """
    running = Running(
        tmp_path, ROOT / "main.py", *SMALL, "--epochs", 9, "-p", 1, "--output", "run", tree
    )
    running.wait_for("epoch 2/9  step 2/4")
    (events,) = (tmp_path / "run").glob("events.out.tfevents.*")
    events.unlink()
    events.symlink_to("/dev/full")
    for name in ("metrics.csv", "curves.png"):
        (tmp_path / "run" / name).unlink(missing_ok=True)
        (tmp_path / "run" / name).mkdir()
    code, out, err = running.end()
    assert code == 0
    assert out[-4].startswith("done: ")
    assert sorted(re.match(r"! run: (.*) could not be written", line)[1] for line in err) == [
        "TensorBoard's events",
        "curves.png",
        "metrics.csv",
    ]
    assert "No space left on device" in "".join(err)
    assert_whole(tmp_path / "run", 9)
