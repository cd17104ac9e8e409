"""Stochastic depth, beside timm's."""

import pytest
import timm
import torch
from torch import nn

import models
from models.classifier import drop_branch


def test_a_branch_is_dropped_whole_and_image_by_image():
    torch.manual_seed(0)
    x = torch.rand(2000, 2, 3, 3) + 1
    y = drop_branch(x, 0.25)
    kept = (y != 0).flatten(1)
    assert torch.equal(kept.any(1), kept.all(1))
    assert kept.all(1).float().mean().item() == pytest.approx(0.75, abs=0.04)
    torch.testing.assert_close(y[kept.all(1)], x[kept.all(1)] / 0.75)


@pytest.mark.parametrize("fused", [False, True])
def test_a_resnet_skips_what_timm_s_skips(fused):
    """The same weights, the same chance: the same logits and gradients."""
    torch.manual_seed(0)
    theirs = timm.create_model("resnet18", num_classes=5, drop_path_rate=0.6).double()
    for module in theirs.modules():  # timm's last BatchNorm starts at 0, and so would every branch
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
    ours = models.create_model("resnet18", num_classes=5).double()
    ours.load_state_dict(theirs.state_dict())
    models.set_fused(ours, fused)
    models.set_drop_path(ours, 0.6)
    rates = [b.drop_path for layer in (1, 2, 3, 4) for b in getattr(ours, f"layer{layer}")]
    assert rates == pytest.approx([0.6 * i / 7 for i in range(8)])
    images, found = torch.randn(6, 3, 32, 32, dtype=torch.float64), []
    for network in (ours, theirs):
        network.train()
        torch.manual_seed(3)
        logits = network(images)
        logits.square().sum().backward()
        found.append((logits, network.conv1.weight.grad))
    torch.testing.assert_close(*found)
    for network in (ours, theirs):
        network.eval()
    torch.testing.assert_close(ours(images), theirs(images))
    whole = ours(images)
    models.set_drop_path(ours, 0.0)
    assert torch.equal(ours(images), whole)  # in evaluation there is none
    ours.train()
    assert (ours(images) - found[0][0]).norm() > 0.1 * found[0][0].norm()  # in training there was


def test_a_mobilenet_drops_only_where_there_is_a_shortcut():
    torch.manual_seed(0)
    network = models.create_model("eca_mobilenetv2", num_classes=5).eval()
    images = torch.randn(4, 3, 32, 32)
    before = network(images)
    models.set_drop_path(network, 0.9)
    blocks = [m for m in network.modules() if hasattr(m, "residual")]
    assert [b.drop_path for b in blocks] == pytest.approx([0.9 * i / 16 for i in range(17)])
    assert torch.equal(network(images), before)  # evaluation
    inner, outer = blocks[15].train(), blocks[16].train()
    assert (inner.residual, outer.residual) == (True, False)
    inner.drop_path = outer.drop_path = 0.5
    x = torch.randn(64, inner.conv[0][0].in_channels, 4, 4)
    skipped = (inner(x) == x).flatten(1).all(1)
    assert 10 < skipped.sum() < 54
    assert outer(x).flatten(1).any(1).all()


def test_dropped_branches_are_the_same_when_a_block_is_computed_again():
    grads = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        network = models.create_model("eca_resnet18", num_classes=5)
        models.set_drop_path(network, 0.5)
        network.set_grad_checkpointing(checkpointing)
        torch.manual_seed(1)
        network.train()(torch.randn(4, 3, 32, 32)).square().sum().backward()
        grads.append([p.grad for p in network.parameters()])
    assert all(map(torch.equal, *grads))


def test_a_rate_that_leaves_nothing_is_refused():
    network = models.create_model("resnet18", num_classes=5)
    for rate in (1, -0.1, 1.5):
        with pytest.raises(ValueError, match="is from 0 to below 1, such as"):
            models.set_drop_path(network, rate)
