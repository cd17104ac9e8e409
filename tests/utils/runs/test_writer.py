"""The commands that a run's last lines give: they work as they are, where it was started."""

import sys
from pathlib import Path

import pytest

from utils.classification.outcome import CLASSIFICATION
from utils.runs import commands, writer
from utils.runs.commands import command, look_line


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with .venv and system, each with a Python; the current one is the folder."""
    for home, names in ((".venv", ("python", "python3")), ("system", ("python", "python3.12"))):
        (tmp_path / home / "bin").mkdir(parents=True)
        (tmp_path / home / "bin" / names[1]).touch(mode=0o755)
        (tmp_path / home / "bin" / names[0]).symlink_to(names[1])
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
    # Activated, it is simply python; so it is where python and python3 are the same.
    monkeypatch.setenv("PATH", str(place / ".venv" / "bin"))
    assert command() == "python '../eca net/main.py'"
    monkeypatch.setenv("PATH", str(place / "system" / "bin"))
    monkeypatch.setattr(sys, "executable", str(place / "system" / "bin" / "python3.12"))
    assert command() == "python '../eca net/main.py'"
    monkeypatch.setenv("PATH", "")
    assert command().startswith(f"{place}/system/bin/python3.12 ")


@pytest.mark.parametrize(("nodes", "flags"), [("1", ""), ("2", "--nnodes=2 ")])
def test_under_a_launcher(place, monkeypatch, nodes, flags):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("GROUP_WORLD_SIZE", nodes)
    monkeypatch.setattr(commands, "_interpreter", lambda: "python")
    rest = f"{flags}--nproc-per-node=2 {'… ' if flags else ''}main.py -e"
    assert command("-e") == f"torchrun {rest}"
    monkeypatch.setattr(commands, "_interpreter", lambda: ".venv/bin/python")
    assert command("-e") == f".venv/bin/python -m torch.distributed.run {rest}"


def test_without_a_best_epoch_there_is_no_checkpoint_to_evaluate(place):
    files = writer.RunFiles(place, {}, CLASSIFICATION, title="net")
    first, *others = files.farewell({}, "DATA")
    assert first == "done: no epoch had a finite validation loss"
    assert not any("best.pth" in line for line in others)
    lines = files.farewell({"val_top1": 50.0, "val_top5": 99.0, "epoch": 2}, "DATA")
    assert lines[0] == "done: best top-1 50.00 %, top-5 99.00 % (epoch 3)"
    assert lines[1].endswith(f"main.py -e --resume {place}/best.pth DATA")
    files.close()
