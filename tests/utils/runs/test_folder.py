"""Run folders: whose they are, which is the newest, and what they say of their run."""

import json
import os
import shlex
import sys
from pathlib import Path

import pytest
import torch
from helpers.tiny_runs import tiny_run

from utils.runs import checkpoint, resume
from utils.runs import folder as run_folder
from utils.system.distributed import Context
from utils.system.errors import UserError


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_run(name, when, **fields):
    path = run_folder.RUNS / name
    path.mkdir(parents=True)
    run_folder.write_json(path / "args.json", fields)
    checkpoint.save(path / "last.pth", tiny_run(**fields))
    os.utime(path / "last.pth", (when, when))
    return path


def test_auto_takes_the_newest_run_of_its_own_kind(capsys):
    detector = {"arch": "retinanet", "backbone": "resnet18"}
    first, second = write_run("resnet18-1", 10, arch="x"), write_run("retinanet-1", 20, **detector)
    assert resume.read("auto", None, None, None, False, None)[1] == first
    assert resume.read_detector("auto", None, None, False)[1] == second
    third, fourth = write_run("retinanet-2", 30, **detector), write_run("resnet18-2", 40, arch="x")
    assert resume.read("auto", None, None, None, False, None)[1] == fourth
    assert resume.read_detector("auto", None, None, False)[1] == third
    (run_folder.RUNS / "other-1").mkdir()
    checkpoint.save(run_folder.RUNS / "other-1" / "last.pth", {})  # newest, and nobody's
    assert run_folder.newest(None) == fourth


def test_an_output_is_refused_before_the_work(tmp_path):
    run_folder.check_output(None)
    run_folder.check_output("new/folder")
    assert not (tmp_path / "new").exists()
    (tmp_path / "used").mkdir()
    run_folder.check_output("used")
    (tmp_path / "used" / "x").touch()
    with pytest.raises(UserError, match="used: is in use; choose a new --output"):
        run_folder.check_output("used")
    with pytest.raises(UserError, match=r"used/x/run: cannot write to .*x; mend its rights"):
        run_folder.check_output("used/x/run")
    with pytest.raises(UserError, match="File name too long; choose another name"):
        run_folder.check_output(f"new/{'x' * 300}")
    (tmp_path / "used" / run_folder.LOCK).touch()  # now it is the folder of a run
    run_folder.check_output("used", tmp_path / "used")
    with pytest.raises(UserError, match="is in use"):
        run_folder.check_output("used", tmp_path / "other")


def test_a_name_is_one_folder():
    assert run_folder.run_name("resnet18", None, "try") == "resnet18_try"
    with pytest.raises(UserError, match="'resnet18_a/b' is no folder's name: give an --action wit"):
        run_folder.run_name("resnet18", "a/b")


def test_a_command_can_be_read_again(monkeypatch):
    words = ["main.py", "--action", "it's", "my data"]
    monkeypatch.setattr(sys, "argv", ["/somewhere/main.py", *words[1:]])
    environment = json.loads(json.dumps(run_folder.environment(Context(torch.device("cpu")))))
    assert shlex.split(environment["command"]) == words


def test_a_name_is_no_pattern():
    for name in ("r_lr[0.1]", "r_*", "r_?"):
        for number in (1, 2):
            (run_folder.RUNS / f"{name}-{number}").mkdir(parents=True)
    (run_folder.RUNS / "r_other-9").mkdir()
    for name in ("r_lr[0.1]", "r_*", "r_?"):
        assert run_folder.newest(name) == run_folder.RUNS / f"{name}-2"
        assert run_folder.create(name) == run_folder.RUNS / f"{name}-3"


def test_a_clock_set_back_resumes_the_run_that_started_last(capsys):
    first = write_run("a-1", 2000, environment={"start_number": 1})
    second = write_run("b-1", 1000, environment={"start_number": 2})
    write_run("old-1", 9000, arch="x")  # from before starts were numbered
    assert run_folder.environment(Context(torch.device("cpu")))["start_number"] == 3
    assert run_folder.newest(None) == second
    assert resume.find("auto", None, None)[1] == second
    assert capsys.readouterr().out == "resuming runs/b-1/last.pth\n"
    assert first in run_folder._by_start()


def test_links_to_nowhere_and_vanished_runs_are_passed_over():
    good = write_run("a-1", 10, arch="x")
    broken = run_folder.RUNS / "b-1"
    broken.mkdir()
    (broken / "last.pth").symlink_to("gone.pth")
    (run_folder.RUNS / "c-1").symlink_to("deleted-while-looking")
    assert run_folder.newest(None) == good
    assert resume.find("auto", None, "runs/b-1")[0] is None
    assert resume.find("auto", "c", None)[0] is None


@pytest.mark.parametrize("dangling", [True, False])
def test_a_lock_that_is_a_link_is_refused_and_its_target_left(tmp_path, dangling):
    target, run = tmp_path / "diary", tmp_path / "run"
    run.mkdir()
    if not dangling:
        target.write_bytes(b"mine")
    (run / ".lock").symlink_to(target)
    with pytest.raises(UserError, match=r"run/\.lock: is a link, which a run never makes; remove"):
        run_folder.FolderLock(run)
    assert not target.exists() if dangling else target.read_bytes() == b"mine"


def test_a_lock_is_never_emptied(tmp_path):
    (tmp_path / ".lock").write_bytes(b"mine")
    held = run_folder.FolderLock(tmp_path)
    assert (tmp_path / ".lock").read_bytes() == b"mine"
    with pytest.raises(UserError, match="another process is training in this folder"):
        run_folder.FolderLock(tmp_path)
    held.close()
    run_folder.FolderLock(tmp_path).close()


def test_an_args_json_that_is_none_is_passed_over():
    """A pipe would be waited for without an end."""
    good, odd = write_run("a-1", 10, arch="x"), write_run("b-1", 20, arch="x") / "args.json"
    for text in ("[1]", "[" * 200_000):
        odd.write_text(text)
        assert run_folder.newest(None) == good
    odd.unlink()
    os.mkfifo(odd)
    assert run_folder.newest(None) == good


def test_json_is_json_whatever_the_figures_are(tmp_path):
    content = {"loss": float("nan"), "AP": [0.5, float("inf")], "best": {"top1": 1}, "path": Path()}
    run_folder.write_json(tmp_path / "evaluation.json", content)

    def refuse(name):
        raise AssertionError(name)

    found = json.loads((tmp_path / "evaluation.json").read_text(), parse_constant=refuse)
    assert found == {"loss": None, "AP": [0.5, None], "best": {"top1": 1}, "path": "."}
