"""Ways to train that are off by default: runs, resumptions bit for bit, refusals in one line."""

import pytest
from helpers.cut_runs import cut_twice, same

from utils.runs import checkpoint

SMALL = ("-a", "eca_resnet18", "--img-size", 32, "-b", 8, "--lr", 0.01, "-j", 0, "--seed", 1)


@pytest.mark.parametrize("network", ["eca_resnet18", "eca_mobilenetv2"])
def test_gradient_checkpointing_changes_no_bit(call, tree, tmp_path, monkeypatch, network):
    """MobileNetV2 has dropout, whose chance is the same in the second pass."""
    flags = (*SMALL, "-a", network, tree)
    saved = cut_twice(call, tmp_path, monkeypatch, *flags, "--grad-checkpointing")
    assert saved["args"]["grad_checkpointing"]
    code, out, _ = call(*flags, "--epochs", 2, "--output", "plain")
    assert code == 0
    assert not any("gradient checkpointing" in line for line in out)
    plain = checkpoint.load(tmp_path / "plain" / "last.pth")
    assert same(plain["state_dict"], saved["state_dict"])
    assert same(plain["optimizer"], saved["optimizer"])
    # A memory that has grown: the run goes on without it.
    last = tmp_path / "plain" / "last.pth"
    code, out, _ = call("--resume", last, "--epochs", 3, "--grad-checkpointing")
    assert code == 0
    assert "  gradient checkpointing: backward computes each block again" in out
