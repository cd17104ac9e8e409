"""What goes wrong where a run goes on, or its checkpoint is evaluated: one line, and nothing lost.

The table in docs/RELIABILITY.md names these tests, too.
"""

import re
import sys
from pathlib import Path

import pytest
import torch
from helpers.small_runs import SMALL, place
from helpers.trees import write_tree

from utils.config.classification import Recipe
from utils.runs import checkpoint, foreign_files
from utils.runs import folder as runs
from utils.runs.checkpoint import Checkpoint
from utils.runs.resume import Start
from utils.runs.writer import RunFiles, command
from utils.system.errors import UserError

pytestmark = pytest.mark.usefixtures("thin")  # as the networks of `run_folder`


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1  # in the middle of some tensor
    path.write_bytes(data)


def test_a_finished_run_started_again_is_no_fault(call, run_folder):
    before = {p.name: p.read_bytes() for p in run_folder.iterdir()}
    code, out, _ = call("--resume", "auto", "--output", run_folder)
    assert code == 0
    assert out[-1] == "all 2 epochs are done: give more with --epochs"
    assert {p.name: p.read_bytes() for p in run_folder.iterdir()} == before


def test_a_damaged_newest_checkpoint_gives_way_to_the_one_before(call, run_folder):
    flip_a_bit(run_folder / "last.pth")
    code, out, err = call("--resume", run_folder / "last.pth")
    assert (code, out) == (2, [])
    assert len(err) == 1
    assert re.search(r"last\.pth: damaged \(checksum of .*--resume auto --output .*run ", err[0])

    wanted = checkpoint.load(run_folder / "previous.pth")
    csv = (run_folder / "metrics.csv").read_text()
    code, out, err = call("--resume", "auto", "--output", run_folder)
    assert (code, err) == (0, [])
    assert re.match(r"! .*last\.pth: damaged \(.*\); taking the one before it$", out[0])
    assert out[1].endswith("previous.pth")
    assert wanted["progress"]["epoch"] == 1
    assert (run_folder / "metrics.csv").read_text() == csv  # the lost epoch, bit for bit
    assert place(run_folder) == (2, 0)
    assert place(run_folder, "previous.pth") == (1, 4)  # the damaged file did not push it out


def test_a_run_goes_on_from_an_older_checkpoint_in_a_new_folder(call, run_folder, tmp_path):
    """From an older checkpoint it takes another course, and what followed stays."""
    before = {p.name: p.read_bytes() for p in run_folder.iterdir()}
    code, out, _ = call("--resume", run_folder / "previous.pth")
    assert code == 0
    assert "is not its run's newest checkpoint: going on in a new folder" in out[0]
    assert {p.name: p.read_bytes() for p in run_folder.iterdir()} == before
    other = tmp_path / "runs" / "mobilenetv2-1"
    assert (other / "best.pth").exists()  # as its closing lines say
    assert (other / "metrics.csv").read_bytes() == before["metrics.csv"]


def test_going_back_leaves_what_followed(call, run_folder, tmp_path):
    before = {p.name: p.read_bytes() for p in run_folder.iterdir()}
    code, _, err = call("--resume", "auto", "--output", run_folder, "--start-epoch", 1)
    assert code == 2
    assert re.match("error: --start-epoch 1 would go over the 2 epochs in .*run: name a ", err[0])
    code, out, _ = call("--resume", run_folder / "last.pth", "--start-epoch", 1, "--lr", 1e-9)
    assert code == 0
    assert out[0] == "--start-epoch 1 goes back: going on in a new folder"
    assert {p.name: p.read_bytes() for p in run_folder.iterdir()} == before
    other = tmp_path / "runs" / "mobilenetv2-1"
    saved = checkpoint.load(other / "best.pth")  # its own, though the old best may be higher
    assert [row["epoch"] for row in saved["history"]] == [0, 1]
    assert saved["progress"]["best"]["epoch"] == 1
    # Without an epoch to lose it stays where it is.
    code, *_ = call("--resume", run_folder / "last.pth", "--start-epoch", 2, "--epochs", 3)
    assert (code, place(run_folder)) == (0, (3, 0))


def test_an_evaluation_says_where_it_cannot_go_before_it_begins(call, run_folder, tmp_path):
    before = {p.name: p.read_bytes() for p in run_folder.iterdir()}
    code, out, err = call("-e", "--resume", "auto", "--output", run_folder)
    assert (code, err) == (0, [])
    assert out[0] == f"evaluating {run_folder}/best.pth"
    assert out[-1].startswith("15 images  top-1")
    for weights in ("--resume", "--pretrained"):
        code, out, err = call("-e", weights, run_folder / "best.pth", "--output", run_folder)
        assert (code, out, len(err)) == (2, [], 1)
        assert "run: is in use; choose a new --output" in err[0]
    assert {p.name: p.read_bytes() for p in run_folder.iterdir()} == before
    # A damaged one: the advice can be followed.
    flip_a_bit(run_folder / "best.pth")
    code, _, err = call("-e", "--resume", run_folder / "best.pth")
    assert code == 2
    assert f"--resume auto --output {run_folder} takes the newest good one" in err[0]
    code, out, _ = call("-e", "--resume", "auto", "--output", run_folder)
    assert (code, out[1]) == (0, f"evaluating {run_folder}/last.pth")
    code, out, err = call("-e", "--resume", "auto", "--output", tmp_path / "new")
    assert (code, out) == (2, [])
    assert "no checkpoint in " in err[0]
    assert "new to evaluate: name one with --resume CKPT" in err[0]


def test_a_safetensors_file_is_the_checkpoint_again(call, run_folder, tree, tmp_path):
    pytest.importorskip("safetensors")
    saved = checkpoint.load(run_folder / "best.pth")
    names = ("arch", "attention", "ksize", "num_classes", "model_kwargs", "img_size", "crop_pct")
    fields = {name: saved[name] for name in names} | {"crop_pct": 0.5, "classes": ["c", "b", "a"]}
    data = foreign_files.to_safetensors(saved["state_dict"], fields)
    (tmp_path / "w.safetensors").write_bytes(data)
    for part, value in (("crop_pct", 0.5), ("classes", fields["classes"])):
        saved[part] = value
    saved["recipe"]["crop_pct"] = 0.5
    saved["args"]["crop_pct"] = None
    checkpoint.save(tmp_path / "same.pth", saved)
    figures = []
    for file in ("same.pth", "w.safetensors"):
        code, out, _ = call("-e", "--resume", file, "-j", 0, tree)
        assert code == 0
        figures.append(out[-1].split("images/s")[0].rsplit("  ", 1)[0])
    assert figures[0] == figures[1]
    flags = (*SMALL, "--epochs", 1, "--pretrained", "w.safetensors", tree)
    code, out, _ = call(*flags)
    assert code == 0
    assert "  Left classifier.1 as initialised: the weights' 3 classes have other names." in out


def test_weights_beside_a_run_s_own_are_refused(call, run_folder, tree):
    file = run_folder / "best.pth"
    code, out, err = call("--resume", run_folder / "last.pth", "--pretrained", file)
    assert (code, out) == (2, [])
    assert f"last.pth has weights of its own: leave --pretrained {file} out" in err[0]
    # A preempted job gives both each time: weights to begin with, and its run to go on with.
    code, _, err = call("--resume", "auto", "--output", run_folder, "--pretrained", file)
    assert code == 2
    assert f"run began with fresh weights: leave --pretrained {file} out" in err[0]
    again = (*SMALL, "--epochs", 1, "--resume", "auto", "--pretrained", file, "--output", "b", tree)
    for first in ("no checkpoint in b yet: starting from the beginning", "resuming b/last.pth"):
        code, out, _ = call(*again)
        assert code == 0
        assert out[0] == first


@pytest.mark.parametrize(
    ("flags", "asked"),
    [
        (("-a", "eca_mobilenetv2"), "leave --arch eca_mobilenetv2 out"),
        (("-e", "--num-classes", 7), "leave --num-classes 7 out"),
        (("-e", "--ksize", "13"), "ksize"),
    ],
)
def test_another_network_than_the_files_is_refused(call, run_folder, flags, asked):
    code, out, err = call("--resume", run_folder / "last.pth", *flags)
    assert code == 2
    assert len(err) == 1
    assert asked in err[0]
    if "leave" in asked:
        assert "holds mobilenetv2, ksize None, 3 classes" in err[0]
    assert not any("epoch" in line for line in out)


def test_weights_are_not_a_run(call, run_folder, tree):
    torch.save(checkpoint.load(run_folder / "last.pth")["state_dict"], "weights.pth")
    code, _, err = call("--resume", "weights.pth", tree)
    assert code == 2
    assert err == [
        "error: weights.pth: holds weights, not a run of this program; start from them "
        "with --pretrained weights.pth"
    ]
    code, _, err = call("-e", "--resume", "weights.pth", "-a", "resnet18", tree)
    assert code == 2
    assert "weights.pth holds mobilenetv2, ksize None, 3 classes: leave --arch resnet18" in err[0]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--seed", 2), "the run's seed is 1: leave --seed 2 out"),
        (
            ("-b", 8),
            "the run stopped inside an epoch, after 2 batches with --batch-size 6: leave "
            "--batch-size 8 out, or begin at an epoch's start with --start-epoch",
        ),
        (("--loss", "bce"), "with --loss ce: leave --loss bce out, or begin"),
        (("--mixup", 0.2), "with --mixup 0: leave --mixup 0.2 out"),
        (("--img-size", 48), "with --img-size 32: leave --img-size 48 out"),
    ],
)
def test_what_would_make_a_resumption_inexact_is_refused(call, run_folder, flags, message):
    saved = checkpoint.load(run_folder / "last.pth")
    saved["progress"].update(epoch=1, step=2)
    checkpoint.save(run_folder / "last.pth", saved)
    code, _, err = call("--resume", run_folder / "last.pth", *flags)
    assert code == 2
    assert message in err[0]


def test_other_data_inside_an_epoch_is_refused(call, run_folder, tmp_path):
    saved = checkpoint.load(run_folder / "last.pth")
    saved["progress"].update(epoch=1, step=2)
    checkpoint.save(run_folder / "last.pth", saved)
    other = write_tree(tmp_path / "other", train=9)
    code, _, err = call("--resume", run_folder / "last.pth", other)
    assert code == 2
    assert "over 24 training images, and there are 27 now: restore the data" in err[0]

    # As many, but one of another name, or of another class.
    for old, new in (("a/0.png", "a/new.png"), ("a/7.png", "b/7a.png")):
        other = write_tree(tmp_path / new[0])
        (other / "train" / old).rename(other / "train" / new)
        code, _, err = call("--resume", run_folder / "last.pth", other)
        assert code == 2
        assert "training images with other names or labels than there are now: restore" in err[0]
    del saved["train_digest"]  # as before there were digests: by number alone
    run = Checkpoint.of(Path("x"), saved).run
    assert (
        Start(run).refuse_changes(Recipe.from_dict(run.recipe), 24, "another", torch.device("cuda"))
        == []
    )


def test_a_run_that_another_process_has_gone_on_with(call, run_folder, monkeypatch):
    """As of a job that is started again while the first one still writes its last checkpoint."""
    real = runs.open_folder

    def meanwhile(*arguments):
        folder = real(*arguments)
        saved = checkpoint.load(folder / "last.pth")
        saved["progress"].update(epoch=2, step=3)
        checkpoint.CheckpointFolder(folder).save_last(saved)
        return folder

    monkeypatch.setattr(runs, "open_folder", meanwhile)
    before = (run_folder / "args.json").read_text()
    code, _, err = call("--resume", "auto", "--output", run_folder, "--epochs", 3)
    assert code == 1
    assert err == [
        f"error: {run_folder}/last.pth: another process has gone on with this run since "
        "it was read (epoch 3, step 3): start again with --resume auto --output "
        f"{run_folder}"
    ]
    assert place(run_folder) == (2, 3)
    assert (run_folder / "args.json").read_text() == before
    with pytest.raises(UserError, match="another process has gone on"):  # nothing to read then
        RunFiles(run_folder, {})


def test_the_command_to_go_on_names_the_device(monkeypatch):
    """It is a flag of one start: without it a run begun on the CPU would go on on a GPU."""
    for given, kept in ((["--device", "cpu"], "--device cpu"), (["--gpu=1"], "--gpu=1"), ([], "x")):
        monkeypatch.setattr(sys, "argv", ["main.py", "-b", "8", *given, "--epochs", "3", "DATA"])
        assert command("--resume", "x").endswith(kept)


def test_momentum_and_decay_can_change_on_the_way(call, run_folder, monkeypatch):
    places, save_last = [], checkpoint.CheckpointFolder.save_last
    monkeypatch.setattr(
        checkpoint.CheckpointFolder,
        "save_last",
        lambda folder, state: places.append(state["progress"]["step"]) or save_last(folder, state),
    )
    flags = ("--epochs", 3, "--momentum", 0.5, "--wd", 0, "--save-minutes", 1e-9)
    assert call("--resume", run_folder / "last.pth", *flags)[0] == 0
    assert places[:4] == [1, 2, 3, 4]  # no step is quicker than 60 ns
    saved = checkpoint.load(run_folder / "last.pth")
    group = saved["optimizer"]["param_groups"][0]
    assert (group["momentum"], group["weight_decay"]) == (0.5, 0.0)
    assert saved["recipe"]["momentum"] == 0.5
    assert [row["epoch"] for row in saved["history"]] == [0, 1, 2]


def test_auto_without_anything_begins_and_then_goes_on(call, tree, tmp_path):
    """The one command of a preempted job, with no folder named."""
    flags = (*SMALL, "--epochs", 1, "--resume", "auto")
    code, out, _ = call(*flags, tree)
    assert code == 0
    assert out[0] == "no checkpoint in runs/mobilenetv2-* yet: starting from the beginning"
    code, out, _ = call(*flags, "--epochs", 2, tree)
    assert code == 0
    assert out[0] == "resuming runs/mobilenetv2-1/last.pth"
    assert place(tmp_path / "runs" / "mobilenetv2-1") == (2, 0)
    code, out, _ = call("--resume", "auto")  # no name at all: the run that saved last
    assert code == 0
    assert out[0] == "resuming runs/mobilenetv2-1/last.pth"


def test_a_demo_resumes_as_the_demo(call):
    """Its network is another than the script's default; auto has to look for that one's runs."""
    code, out, _ = call("demo:digits", "--resume", "auto", "-b", "100000")
    assert code == 2
    assert out[0] == "no checkpoint in runs/eca_resnet18-* yet: starting from the beginning"
