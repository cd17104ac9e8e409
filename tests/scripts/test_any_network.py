"""Networks of timm and torchvision, and other attentions, on the whole way from main.py on."""

from pathlib import Path

import pytest
import torch
import torchvision
from helpers.cut_runs import cut_twice

import export
import paras_flops
import predict
import visualize_attention
from models import eca_resnet
from utils.runs import checkpoint

timm = pytest.importorskip("timm")
FLAGS = ("-b", 8, "--img-size", 32, "--lr", 0.01, "-j", 0, "--seed", 1)
GATE = """
from torch import nn

class MyGate(nn.Module):
    def __init__(self, channels, k=3):
        super().__init__()
        self.conv = nn.Conv1d(1, 1, k, padding=k // 2, bias=False)

    def forward(self, x):
        return x * self.conv(x.mean((2, 3))[:, None])[:, 0, :, None, None].sigmoid()
"""
# What is trained, and the flags that a checkpoint's readers need again.
CASES = {
    "timm, eca": (
        ("-a", "timm:test_resnet.r160_in1k", "--attention", "eca", "--drop-path", 0.2),
        (),
    ),
    "torchvision": (("-a", "torchvision:squeezenet1_1", "--img-size", 48), ()),
    "timm's attention": (("-a", "resnet18", "--attention", "timm:cbam"), ()),
    "one's own": (
        ("-a", "eca_resnet18", "--attention", "mine.py:MyGate"),
        ("--attention", "mine.py:MyGate"),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_trained_killed_resumed_evaluated_predicted_exported(
    call, tree, tmp_path, monkeypatch, case
):
    monkeypatch.setattr(eca_resnet, "WIDTHS", (8, 16, 32, 64))
    (tmp_path / "mine.py").write_text(GATE)
    network, again = CASES[case]
    saved = cut_twice(call, tmp_path, monkeypatch, *FLAGS, *network, tree)
    assert saved["arch"] == network[1]
    code, out, err = call("-e", "--resume", "through/last.pth", *again, tree)
    assert (code, err) == (0, [])
    top1 = next(line for line in out if "top-1" in line)
    images = sorted(str(path) for path in (Path(tree) / "val").rglob("*.png"))[:2]
    saved_as = ("through/last.pth", *again)
    code, out, _ = call(*saved_as, *images, entry=predict.main)
    assert (code, len(out)) == (0, 2)
    call(*saved_as, "--to", "onnx", "--output", "out", entry=export.main)
    code, exported, err = call("-e", "--resume", "out/last.onnx", tree)
    assert (code, err) == (0, [])
    assert top1.rpartition("loss")[0] in " ".join(exported)


def test_images_are_prepared_as_the_library_says(call, tree, tmp_path):
    flags = ("-b", 24, "-j", 0, "--epochs", 1, "--seed", 1, "--lr", 0.01)
    code, _, err = call("-a", "timm:test_resnet.r160_in1k", *flags, "--output", "run", tree)
    assert (code, err) == (0, [])
    saved = checkpoint.load(tmp_path / "run" / "last.pth")
    config = timm.data.resolve_data_config({}, model=timm.create_model("test_resnet.r160_in1k"))
    assert saved["img_size"] == config["input_size"][-1] == 160
    for name in ("crop_pct", "interpolation", "mean", "std"):
        assert saved["recipe"][name] == config[name], name


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("-a", "timm:resnet_18"), "timm has no classifier 'resnet_18'; did you mean timm:resnet"),
        (("-a", "timm:vit_tiny_patch16_224"), "fails with images of 32 pixels"),
        (("-a", "torchvision:vgg11", "--attention", "eca"), "found no place for ECA in VGG"),
        (("-a", "torchvision:resnet18", "--identity-start"), "--identity-start is for eca"),
        (("-a", "timm:resnet18", "--attention", "se", "--ksize", 3), "leave --ksize 3 out"),
        (("-a", "torchvision:resnet18", "--drop-path", 0.1), "takes no --drop-path 0.1: leave it"),
        (("-a", "timm:vgg11", "--drop-path", 0.1), "takes no --drop-path 0.1: leave it"),
        (("-a", "resnet18", "--attention", "timm:bat"), "cannot be built with channels alone"),
        (("-a", "resnet18", "--attention", "mine.py:MyGate"), "no file mine.py"),
        (("-a", "torchvision:resnet18", "--grad-checkpointing"), "count each batch twice"),
        (
            ("-a", "torchvision:squeezenet1_1", "--img-size", 48, "--grad-checkpointing"),
            "squeezenet1_1 has none: leave it out",
        ),
    ],
)
def test_what_cannot_be_done_is_one_line(call, tree, flags, message):
    code, _, err = call(*FLAGS, *flags, tree)
    assert code == 2
    assert message in err[-1]
    assert len(err) <= 3  # argparse's usage


def test_gradient_checkpointing_is_the_librarys_own(call, tree, monkeypatch):
    """Of a network without BatchNorm, which would count each batch twice."""
    calls, own = [], timm.models.convnext.checkpoint_seq
    monkeypatch.setattr(
        timm.models.convnext, "checkpoint_seq", lambda *a: calls.append(a) or own(*a)
    )
    flags = ("-a", "timm:test_convnext", "--epochs", 1, "--grad-checkpointing", "--output", "run")
    code, _, err = call(*FLAGS, *flags, tree)
    assert (code, err) == (0, [])
    assert calls


def test_a_strangers_checkpoint_runs_no_file(call, tree, tmp_path, run_folder):
    (tmp_path / "evil.py").write_text("open('ran', 'w')\n" + GATE)
    saved = checkpoint.load(tmp_path / "run" / "last.pth")
    saved["args"]["attention"] = "evil.py:MyGate"
    checkpoint.save(tmp_path / "stranger.pth", saved)
    call("--resume", "stranger.pth", "--output", "new", tree)
    saved |= {"attention": "evil.py:MyGate", "model_kwargs": {"attention_sha256": "0"}}
    checkpoint.save(tmp_path / "stranger2.pth", saved)
    code, _, err = call("-e", "--resume", "stranger2.pth", tree)
    assert code == 2
    assert "give --attention evil.py:MyGate" in err[-1]
    assert not (tmp_path / "ran").exists()


def test_gates_and_counts_of_a_librarys_network(call, tree):
    flags = (*FLAGS, "-b", 24, "-a", "torchvision:resnet18", "--attention", "eca", "--epochs", 1)
    code, _, err = call(*flags, "--output", "run", tree)
    assert (code, err) == (0, [])
    code, out, _ = call("run/last.pth", tree, "-j", 0, entry=visualize_attention.main)
    assert code == 0
    assert sum(line.startswith("layer1.") or line.startswith("layer4.") for line in out) == 4
    _, out, _ = call(*flags[-6:-2], entry=paras_flops.main)
    count = sum(p.numel() for p in torchvision.models.resnet18().parameters())
    assert f"{count + 36:,}" in next(line for line in out if line.startswith("parameters"))
    assert torch.load("run/last.pth", weights_only=True)["ksize"] == [3, 3, 5, 5, 5, 5, 5, 5]
