"""--decoder cuda as a user starts it: where it is refused, and whole runs."""

import shutil

import pytest
import torch
from helpers.mixed_images import write_mixed
from helpers.small_runs import SMALL

import detect_main
import main as script
import predict
import visualize_attention
from tests.scripts.test_main import fail
from tools import check_images
from utils.data import decoding
from utils.data.gpu_decoding import DeviceReading, check_decoder
from utils.runs import checkpoint
from utils.system.errors import UserError

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", ["main.py", "light_main.py"])
def test_a_run_on_the_cpu_is_refused_before_the_data_is_looked_for(run, name):
    done = run(name, "--decoder", "cuda", "--device", "cpu", "nowhere")
    fail(done, "error: --decoder cuda", "this run is on cpu", "such as torchvision")
    assert done.stdout == ""


def test_a_torchvision_that_cannot_is_refused(call, monkeypatch):
    def fails(encoded, device):
        raise RuntimeError("not compiled with nvJPEG\nsupport")

    with pytest.raises(UserError) as caught:
        check_decoder("cuda", torch.device("cuda"), fails)
    assert str(caught.value) == (
        "--decoder cuda: torchvision does not decode on this GPU (not compiled with nvJPEG): give "
        "another --decoder, such as torchvision"
    )
    check_decoder("cuda", torch.device("cuda"), lambda encoded, device: [])
    check_decoder("torchvision", CPU, fails)

    monkeypatch.setattr(decoding, "jpeg_decoder", lambda: None)  # a torchvision that has dropped it
    code, _, err = call("--decoder", "cuda", "DATA")
    assert (code, len(err)) == (2, 1)
    assert "argument --decoder: this torchvision decodes no JPEGs" in err[0]
    assert "give another one, such as torchvision" in err[0]


@pytest.mark.parametrize("module", [visualize_attention, predict, check_images, detect_main])
def test_scripts_that_decode_on_the_cpu_do_not_know_it(call, module):
    code, _, err = call("--decoder", "cuda", "a", "b", entry=module.main)
    assert (code, len(err)) == (2, 1)
    assert "'cuda' is not one of torchvision" in err[0] or "unknown argument --decoder" in err[0]
    _, out, _ = call("-h", *(["all"] if module is detect_main else []), entry=module.main)
    usage = " ".join(out)
    decoder = usage[usage.rfind("--decoder NAME") :].split(" --")[0]
    assert "cuda" not in decoder


def test_a_whole_run_and_one_resumed_with_another_decoder(call, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "check_decoder", lambda decoder, device: None)
    used = []
    monkeypatch.setattr(DeviceReading, "batches", note(DeviceReading.batches, used))
    for part in ("train", "val"):
        write_mixed(tmp_path / "data" / part / "a")
        shutil.copytree(tmp_path / "data" / part / "a", tmp_path / "data" / part / "b")
    flags = (*SMALL, "--output")
    assert call(*flags, "there", "--epochs", 2, "data")[0] == 0
    assert not used
    assert call(*flags, "here", "--epochs", 1, "--decoder", "cuda", "data")[0] == 0
    assert len(used) == 2
    further = ("--resume", "here/last.pth", "--epochs", 2)
    assert call(*further)[0] == 0  # which is the run's own setting
    assert len(used) == 4
    there, here = (checkpoint.load(f"{name}/last.pth") for name in ("there", "here"))
    assert here["args"]["decoder"] == "cuda"
    for key, value in there["state_dict"].items():
        assert torch.equal(value, here["state_dict"][key]), key
    assert here["history"] == there["history"]
    figures = []
    for name, decoder in (("here", "torchvision"), ("there", "cuda")):
        code, out, _ = call("-e", "--resume", f"{name}/last.pth", "--decoder", decoder)
        assert code == 0
        figures.append(out[-1].split("  ")[1:4])  # without the speed
    assert figures[0] == figures[1]
    assert len(used) == 5
    assert call(*further[:2], "--epochs", 3, "--decoder", "pil")[0] == 0
    assert len(used) == 5
    assert checkpoint.load("here/last.pth")["args"]["decoder"] == "pil"


def note(method, calls: list):
    def noted(*arguments):
        calls.append(arguments)
        return method(*arguments)

    return noted
