"""The commands that a run's last lines give: they work as they are, where it was started."""

import sys
from pathlib import Path

import pytest
from helpers.tiny_runs import tiny_run
from PIL import Image

from utils.config.flags import RunSettings
from utils.runs import writer
from utils.runs.folder import FolderLock
from utils.runs.writer import command, look_line
from utils.training.classification import FIGURES, best_words, panels


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with .venv and system, each with a Python; the current one is the folder."""
    for home in (".venv", "system"):
        (tmp_path / home / "bin").mkdir(parents=True)
        (tmp_path / home / "bin" / "python3").touch(mode=0o755)
        (tmp_path / home / "bin" / "python").symlink_to("python3")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path / "system" / "bin"))
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.delenv("GROUP_WORLD_SIZE", raising=False)
    monkeypatch.setattr(sys, "argv", ["main.py", "demo:digits"])
    return tmp_path


def test_the_script_as_it_was_given_and_the_python_that_runs(place, monkeypatch):
    monkeypatch.setattr(sys, "executable", str(place / ".venv" / "bin" / "python"))
    assert command("--resume", "a b.pth") == ".venv/bin/python main.py --resume 'a b.pth'"
    assert look_line(Path("runs/a-1")) == (
        "  look:        .venv/bin/python -m tensorboard.main --logdir runs/a-1   "
        "(or runs/a-1/curves.png)"
    )
    (place / "elsewhere").mkdir()
    monkeypatch.chdir(place / "elsewhere")
    monkeypatch.setattr(sys, "argv", ["../eca net/main.py"])
    assert command() == f"{place}/.venv/bin/python '../eca net/main.py'"
    monkeypatch.setenv("PATH", str(place / ".venv" / "bin"))  # activated
    assert command() == "python '../eca net/main.py'"


@pytest.mark.parametrize(("nodes", "flags"), [("1", ""), ("2", "--nnodes=2 ")])
def test_under_a_launcher(place, monkeypatch, nodes, flags):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("GROUP_WORLD_SIZE", nodes)
    monkeypatch.setattr(writer, "_interpreter", lambda: "python")
    rest = f"{flags}--nproc-per-node=2 {'… ' if flags else ''}main.py -e"
    assert command("-e") == f"torchrun {rest}"
    monkeypatch.setattr(writer, "_interpreter", lambda: ".venv/bin/python")
    assert command("-e") == f".venv/bin/python -m torch.distributed.run {rest}"


def a_run_writes(folder):
    """What a run writes, from its first file to its last."""
    snapshot = tiny_run()
    fixed = {name: snapshot.pop(name) for name in ("format", "arch", "seed")}
    files = writer.RunFiles(folder, fixed, title="net")
    try:
        files.begin(snapshot)
        columns = [f"{part}_{name}" for part in ("train", "val") for name in FIGURES]
        row = {"epoch": 0, **dict.fromkeys(["lr", *columns], 0.5)}
        files.finish_epoch({**snapshot, "history": [row]}, panels(), 7.0, improved=True)
        files.path("predictions.png").touch()
    finally:
        files.close()


def test_each_file_of_a_run_is_checked(place, monkeypatch):
    """That the folder is the run's still; what follows if not is tested with a run."""
    checks, real = [], FolderLock.check
    monkeypatch.setattr(FolderLock, "check", lambda lock: checks.append(real(lock)))
    (place / "run").mkdir()
    a_run_writes(place / "run")
    names = {path.name.partition(".out")[0] for path in (place / "run").iterdir()}
    checkpoints = {"best.pth", "last.pth", "previous.pth"}
    others = {"args.json", "curves.png", "events", "metrics.csv", "predictions.png"}
    assert names == {".lock", *checkpoints, *others}
    assert len(checks) == 8  # last twice


def test_minutes_between_two_checkpoints_are_those_of_the_clock(place, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(writer.time, "monotonic", lambda: now[0])
    files = writer.RunFiles(None, {}, flags=RunSettings(save_minutes=2.5))
    files.save({})
    for seconds, due in ((149, False), (150, True), (151, True)):
        now[0] = seconds
        assert files.due(1) == due
    files.save({})
    assert not files.due(1)
    assert not writer.RunFiles(None, {}).due(1)


def test_an_epoch_s_best_is_written_before_its_last(place, monkeypatch):
    """A run that is killed between the two does the epoch again, and loses no best one."""
    written = []
    for name in ("save_last", "save_best"):
        monkeypatch.setattr(writer.CheckpointFolder, name, lambda *_, n=name: written.append(n))
    (place / "run").mkdir()
    a_run_writes(place / "run")
    assert written == ["save_last", "save_best", "save_last"]


def test_without_a_best_epoch_there_is_no_checkpoint_to_evaluate(place):
    files = writer.RunFiles(place, {}, title="net")
    first, *others = files.farewell(best_words({}, "top1", 10), False, "DATA")
    assert first == "done: no epoch had a finite validation loss"
    assert not any("best.pth" in line for line in others)
    best = {"val_top1": 50.0, "val_top5": 99.0, "epoch": 2}
    lines = files.farewell(best_words(best, "top1", 10), True, "DATA")
    assert lines[0] == "done: best top-1 50.00 %, top-5 99.00 % (epoch 3)"
    assert lines[1].endswith(f"main.py -e --resume {place}/best.pth DATA")
    assert not any("train on" in line for line in lines)
    *_, last = files.farewell("", True, "DATA", "--epochs", 8)
    assert last.endswith(f"main.py --resume {place}/last.pth --epochs 8")
    files.close()


def test_a_later_figure_is_drawn_beside_epochs_that_lack_it(place):
    """A run that an earlier version began, and a fifth panel."""
    early = {"epoch": 0, "lr": 0.1, "val_top1": 3.0}
    curves = tuple(writer.Curve(name, name) for name in ("val_top1", "val_f1"))
    diagrams = [writer.Panel("x", "y", curves)] * 5
    logger = writer.RunLogger(place, "net")
    logger.log([early], diagrams, 1.0)
    logger.log([early, {**early, "epoch": 1, "val_f1": 2.0}], diagrams, 1.0)
    assert (place / "metrics.csv").read_text().splitlines()[1:] == ["1,0.1,3.0,", "2,0.1,3.0,2.0"]
    with Image.open(place / "curves.png") as picture:
        assert picture.size == (990, 1089)
    assert not logger.warned
