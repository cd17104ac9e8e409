"""What goes wrong with a run's flags, data, numbers and devices: one line, the right exit code.

The table in docs/RELIABILITY.md names these tests. What goes wrong where a run goes on is in
test_faults_resume.py, harm done to processes in test_harm.py.
"""

import re
import shutil
from pathlib import Path

import pytest
import torch
from helpers.kill_driver import same
from helpers.small_runs import SMALL, place

from utils.runs import checkpoint
from utils.system import distributed

pytestmark = pytest.mark.usefixtures("thin")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--output", "run"), "run: is in use"),
        (("--action", "a/b"), "give an --action without /"),
        (("--pretrained", "run/last.pth", "-a", "resnet18"), "run/last.pth: the weights do not fi"),
        (("--epochs", 3, "--start-epoch", 7), "--start-epoch 7: the run has 3 epochs; give a "),
    ],
)
def test_flags_are_judged_before_the_data(call, run_folder, flags, said):
    """There is no data: with a wrong flag it is not looked for, which takes long at a million."""
    code, out, err = call(*SMALL, "nowhere", *flags)
    assert (code, out, len(err)) == (2, [], 1)
    assert said in err[0]


def assert_first_state_alone(folder: Path) -> None:
    """The run's only checkpoint is the one from before its first step, with finite weights."""
    assert [path.name for path in folder.glob("*.pth")] == ["last.pth"]
    assert place(folder) == (0, 0)
    tensors = checkpoint.load(folder / "last.pth")["state_dict"].values()
    assert all(tensor.isfinite().all() for tensor in tensors)


def test_a_loss_that_is_not_finite_ends_the_run(call, tree, tmp_path):
    flags = (*SMALL, "--epochs", 2, "--output", tmp_path / "run")
    code, out, err = call(*flags, "--lr", 1e30, tree)
    assert code == 3
    assert len(err) == 1
    assert re.match(r"error: the loss of step \d is not a finite number; the weights were", err[0])
    assert not any(line.startswith("epoch 1/2  train") for line in out)
    assert_first_state_alone(tmp_path / "run")  # nothing ruined was written


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
    assert_first_state_alone(tmp_path / "new")

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
    assert f"{data}/val/c/1.png: not an image; mend or remove the file" in err[0]
    assert "--skip-bad-images" not in err[0]  # which is for training images
    assert place(tmp_path / "saved")[0] == 0  # found while the first epoch trains, not after it


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


def test_a_seed_gives_equal_runs_on_two_threads_too(call, tree, tmp_path):
    flags = ("-a", "eca_resnet18", *SMALL[2:], "--epochs", 1, "--img-size", 64, "-b", 24)
    former = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        for name in ("one", "two"):
            assert call(*flags, "--output", tmp_path / name, tree)[0] == 0
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
