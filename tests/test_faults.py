"""What goes wrong with a run's files and flags: one line, the right exit code, and nothing lost.

The table in docs/RELIABILITY.md names these tests. Harm done to processes is in test_harm.py.
"""

import errno
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from conftest import write_tree
from kill_driver import same

import main as script
from utils import checkpoint, cli, distributed, export_files
from utils.errors import UserError
from utils.faults import Memory, in_one_line
from utils.resume import refuse_other_data
from utils.run_files import RunFiles, command

SMALL = ("-a", "mobilenetv2", "--img-size", 32, "-b", 6, "--lr", 0.01, "-j", 0, "--seed", 1)

@pytest.fixture
def call(tmp_path, monkeypatch, capfd):
    """main.py's main in this process: (exit code, lines on stdout, lines on stderr)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "end_children", lambda: True)

    def start(*arguments):
        monkeypatch.setattr(sys, "argv", ["main.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.run_script(script.main)
        out, err = capfd.readouterr()
        return ended.value.code, out.splitlines(), err.splitlines()

    yield start
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="module")
def finished(tree, tmp_path_factory):
    """The folder of a run of two epochs. Read only: copy it."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", list(map(str, ["main.py", *SMALL, "--epochs", 2, "--output",
                                                  folder, tree])))  # fmt: skip
        assert script.main() == 0
    torch.use_deterministic_algorithms(False)
    return folder


@pytest.fixture
def run_folder(finished, tmp_path):
    return Path(shutil.copytree(finished, tmp_path / "run"))


def place(folder: Path, name: str = "last.pth") -> tuple[int, int]:
    progress = checkpoint.load(folder / name)["progress"]
    return progress["epoch"], progress["step"]


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
    data = export_files.to_safetensors(saved["state_dict"], fields)
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
    ("flags", "said"),
    [
        (("--output", "run"), "run: is in use"),
        (("--action", "a/b"), "give an --action without /"),
        (("--pretrained", "none.pth"), "none.pth: no such file"),
        (("--pretrained", "run/last.pth", "-a", "resnet18"), "run/last.pth: the weights do not fi"),
        (("--epochs", 3, "--start-epoch", 7), "--start-epoch 7: the run has 3 epochs; give a "),
    ],
)
def test_flags_are_judged_before_the_data(call, run_folder, flags, said):
    """There is no data: with a wrong flag it is not looked for, which takes long at a million."""
    code, out, err = call(*SMALL, "nowhere", *flags)
    assert (code, out, len(err)) == (2, [], 1)
    assert said in err[0]


@pytest.mark.parametrize(
    ("flags", "asked"),
    [
        (("-a", "eca_mobilenetv2"), "leave --arch eca_mobilenetv2 out"),
        (("--num-classes", 7), "leave --num-classes 7 out"),
        (("--ksize", "13"), "ksize"),
    ],
)
@pytest.mark.parametrize("how", [(), ("-e",)])
def test_another_network_than_the_files_is_refused(call, run_folder, flags, asked, how):
    code, out, err = call(*how, "--resume", run_folder / "last.pth", *flags)
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
    assert err == ["error: weights.pth: holds weights, not a run of this program; start from them "
                   "with --pretrained weights.pth"]  # fmt: skip
    code, _, err = call("-e", "--resume", "weights.pth", "-a", "resnet18", tree)
    assert code == 2
    assert "weights.pth holds mobilenetv2, ksize None, 3 classes: leave --arch resnet18" in err[0]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--seed", 2), "the run's seed is 1: leave --seed 2 out"),
        (("-b", 8), "after 2 batches of 6: leave -b 8 out, or begin at an epoch's start"),
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
    refuse_other_data(saved, "another")


def test_a_run_that_another_process_has_gone_on_with(call, run_folder, monkeypatch):
    """As of a job that is started again while the first one still writes its last checkpoint."""
    real = script.runs.open_folder

    def meanwhile(*arguments):
        folder = real(*arguments)
        saved = checkpoint.load(folder / "last.pth")
        saved["progress"].update(epoch=2, step=3)
        checkpoint.CheckpointFolder(folder).save_last(saved)
        return folder

    monkeypatch.setattr(script.runs, "open_folder", meanwhile)
    before = (run_folder / "args.json").read_text()
    code, _, err = call("--resume", "auto", "--output", run_folder, "--epochs", 3)
    assert code == 1
    assert err == [f"error: {run_folder}/last.pth: another process has gone on with this run since "
                   "it was read (epoch 3, step 3): start again with --resume auto --output "
                   f"{run_folder}"]  # fmt: skip
    assert place(run_folder) == (2, 3)
    assert (run_folder / "args.json").read_text() == before
    with pytest.raises(UserError, match="another process has gone on"):  # nothing to read then
        RunFiles(run_folder, {}, "", 0, None, None, None)


def test_the_command_to_go_on_names_the_device(monkeypatch):
    """It is a flag of one start: without it a run begun on the CPU would go on on a GPU."""
    for given, kept in ((["--device", "cpu"], "--device cpu"), (["--gpu=1"], "--gpu=1"), ([], "x")):
        monkeypatch.setattr(sys, "argv", ["main.py", "-b", "8", *given, "--epochs", "3", "DATA"])
        assert command("--resume", "x").endswith(kept)


def test_momentum_and_decay_can_change_on_the_way(call, run_folder, monkeypatch):
    places, save_last = [], checkpoint.CheckpointFolder.save_last
    monkeypatch.setattr(
        checkpoint.CheckpointFolder, "save_last",
        lambda folder, state: places.append(state["progress"]["step"]) or save_last(folder, state),
    )  # fmt: skip
    code, *_ = call("--resume", run_folder / "last.pth", "--epochs", 3, "--momentum", 0.5,
                    "--wd", 0, "--save-minutes", 1e-9)  # fmt: skip
    assert code == 0
    assert places[:4] == [1, 2, 3, 4]  # no step is quicker than 60 ns
    saved = checkpoint.load(run_folder / "last.pth")
    group = saved["optimizer"]["param_groups"][0]
    assert (group["momentum"], group["weight_decay"]) == (0.5, 0.0)
    assert saved["recipe"]["momentum"] == 0.5
    assert [row["epoch"] for row in saved["history"]] == [0, 1, 2]


def test_a_loss_that_is_not_finite_ends_the_run(call, tree, tmp_path):
    flags = (*SMALL, "--epochs", 2, "--output", tmp_path / "run")
    code, out, err = call(*flags, "--lr", 1e30, tree)
    assert code == 3
    assert len(err) == 1
    assert re.match(r"error: the loss of step \d is not a finite number; the weights were", err[0])
    assert not any(line.startswith("epoch 1/2  train") for line in out)
    assert not list((tmp_path / "run").glob("*.pth"))  # nothing ruined was written


def test_the_last_finite_checkpoint_stays(call, run_folder):
    before = {p.name: p.read_bytes() for p in run_folder.glob("*.pth")}
    code, _, err = call("--resume", run_folder / "last.pth", "--epochs", 4, "--lr", 1e30)
    assert code == 3
    assert re.match(r"error: the loss of step (9|1\d) ", err[0])  # 8 steps lay behind
    assert {p.name: p.read_bytes() for p in run_folder.glob("*.pth")} == before


def test_weights_that_are_not_finite_are_never_saved(call, run_folder, tree, tmp_path):
    """The loss before the update that ruins them is finite."""
    flags = (*SMALL, "--save-every", 1, "--lr", 1e38)
    code, _, err = call(*flags, "--epochs", 1, "--output", tmp_path / "new", tree)
    assert code == 3
    assert err[0].startswith("error: after step 1 of epoch 1 the network's weights or BatchNorm ")
    assert not list((tmp_path / "new").glob("*.pth"))

    # Nor do they push out what was good: two steps would replace both last and previous.
    before = {p.name: p.read_bytes() for p in run_folder.glob("*.pth")}
    code, _, err = call("--resume", run_folder / "last.pth", *flags[-4:], "--epochs", 4, "-b", 24)
    assert code == 3
    assert err[0].startswith("error: after step 1 of epoch 3 the network's weights or BatchNorm ")
    assert {p.name: p.read_bytes() for p in run_folder.glob("*.pth")} == before


def test_broken_images(call, tree, tmp_path):
    data = Path(shutil.copytree(tree, tmp_path / "data"))
    spoilt = [data / "train" / "a" / "3.png", data / "train" / "b" / "0.png"]
    spoilt[0].write_bytes(spoilt[0].read_bytes()[:100])
    spoilt[1].write_bytes(b"")
    flags = (*SMALL, "--epochs", 1)
    code, _, err = call(*flags, data)
    assert code == 1
    assert len(err) == 1
    assert any(str(path) in err[0] for path in spoilt)
    assert "or train with --skip-bad-images" in err[0]

    code, out, _ = call(*flags, "--skip-bad-images", data)
    assert code == 0
    at = out.index("2 times an image that cannot be read was replaced:")
    assert out[at + 1 : at + 3] == [str(path) for path in spoilt]

    (data / "val" / "c" / "1.png").write_text("no image")
    code, _, err = call(*flags, "--skip-bad-images", "--output", "saved", data)
    assert code == 1
    assert f"{data}/val/c/1.png: not an image" in err[0]
    assert place(tmp_path / "saved") == (0, 4)  # the epoch's training is not lost


def test_one_process_over_two_gpus(call, tree, tmp_path, monkeypatch):
    """All but the GPUs themselves: without them torch's DataParallel passes the batch through."""
    two = distributed.Context(torch.device("cpu"), data_parallel=(0, 1))
    monkeypatch.setattr(distributed, "setup", lambda device, gpu: two)
    flags = (*SMALL, "--epochs", 1, "--amp", "bf16", "--output", tmp_path / "run", tree)
    code, _, err = call(*flags, "--compile")
    assert code == 2
    assert "--compile does not go with DataParallel over 2 GPUs: start with torchrun" in err[0]
    code, _, err = call(*flags, "-b", 9)
    assert code == 2
    assert "does not divide over 2 devices: give 8 or 10" in err[0]

    code, out, err = call(*flags)
    assert (code, err) == (0, [])
    assert any("x 2 (DataParallel); bf16" in line for line in out)
    assert "  torchrun --nproc-per-node=2 is faster" in out
    saved = checkpoint.load(tmp_path / "run" / "last.pth")
    assert not any(key.startswith("module.") for key in saved["state_dict"])
    assert not torch.backends.cudnn.benchmark  # --seed
    code, out, err = call("-e", "--resume", tmp_path / "run" / "best.pth")
    assert (code, err) == (0, [])
    assert torch.backends.cudnn.benchmark
    assert out[-1].startswith("15 images  top-1 ")
    code, _, err = call("-e", "--fast", "--compile", "--resume", tmp_path / "run" / "best.pth")
    assert code == 2
    assert "--compile does not go with DataParallel" in err[0]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.EMFILE, "Too many open files"), "too many open files: use fewer"),
        (OSError(errno.ENFILE, "Too many open files in system"), "too many open files: use fewer"),
        (OSError("Caught OSError in DataLoader worker\n… [Errno 24] Too many open files"),
         "too many open files: use fewer"),
        (RuntimeError("received 0 items of ancdata"), "too many open files: use fewer"),
        (BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable"),
         "no more processes allowed: use fewer workers (-j), or raise the limit (ulimit -u)"),
    ],
)  # fmt: skip
def test_limits_of_files_and_processes(error, message):
    with pytest.raises(UserError) as caught, in_one_line(Memory("-b 8", "a smaller -b")):
        raise error
    assert str(caught.value).startswith(message)
    assert caught.value.exit_code == 1


def test_a_seed_gives_equal_runs_on_two_threads_too(call, tree, tmp_path):
    former = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        for name in ("one", "two"):
            code, *_ = call("-a", "eca_resnet18", *SMALL[2:], "--epochs", 1, "--img-size", 64,
                            "--output", tmp_path / name, tree)  # fmt: skip
            assert code == 0
    finally:
        torch.set_num_threads(former)
    one, two = (checkpoint.load(tmp_path / name / "last.pth") for name in ("one", "two"))
    for part in ("state_dict", "optimizer", "progress", "history"):
        assert same(one[part], two[part]), part


def test_an_output_folder_in_use(call, run_folder, tree, tmp_path):
    before = {p.name: p.read_bytes() for p in run_folder.iterdir()}
    code, _, err = call(*SMALL, "--output", run_folder, tree)
    assert code == 2
    assert "run: is in use; choose a new --output, or continue the run in it with --resu" in err[0]
    assert {p.name: p.read_bytes() for p in run_folder.iterdir()} == before

    # Nor does --resume auto take somebody's folder for a run killed before its first checkpoint.
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "args.json").write_text("precious")
    code, _, err = call(*SMALL, "--resume", "auto", "--output", tmp_path / "mine", tree)
    assert code == 2
    assert "mine: is in use" in err[0]
    assert (tmp_path / "mine" / "args.json").read_text() == "precious"


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
