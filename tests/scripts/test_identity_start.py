"""main.py --identity-start: a plain network's weights, and ECA that begins without effect."""

import pytest
import torch
import torchvision
from helpers.small_runs import SMALL

import main as script
import models
from utils.system.errors import EXIT_STOPPED

FLAGS = (*SMALL[2:], "-a", "eca_resnet18", "--epochs", 1, "--pretrained", "plain.pth")


@pytest.fixture
def plain(tmp_path):
    torch.manual_seed(0)
    network = torchvision.models.resnet18(num_classes=3).eval()
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.uniform_(module.bias, -0.5, 0.5)
    torch.save(network.state_dict(), tmp_path / "plain.pth")
    return network


@pytest.mark.parametrize("identity", [True, False])
def test_the_run_begins_where_the_plain_network_is(call, tree, plain, monkeypatch, identity):
    begun = []
    monkeypatch.setattr(script, "train_one_epoch", lambda state, *_: begun.append(state.network))
    code, out, _ = call(*FLAGS, *["--identity-start"] * identity, tree)
    assert code == EXIT_STOPPED
    assert any("8 attention kernels are new" in line for line in out)
    assert not any("prefixes" in line for line in out)  # the names had none
    network = begun[0].eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = plain(images)
        for fused in (True, False):
            models.set_fused(network, fused)
            found = network(images)
            assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5) == identity


def test_where_it_would_do_nothing_it_is_refused(call, plain, run_folder):
    code, _, err = call("--resume", "run/last.pth", "--identity-start")
    assert (code, "--identity-start is for new attention" in err[-1]) == (2, True)
    code, _, err = call("-e", "--pretrained", "plain.pth", "--identity-start", "x")
    assert code == 2
    assert "--identity-start does nothing with -e" in err[-1]
