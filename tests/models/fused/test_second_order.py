"""Gradients of gradients of the fused tail: against differences, and against the modules."""

import copy

import pytest
import torch
from helpers.tail_cases import FORMS, make_input, make_modules
from torch import nn
from torch.autograd import gradcheck, gradgradcheck

from models import set_fused
from models.eca_module import ECALayer
from models.eca_resnet import Bottleneck, ResNet
from models.fused.block_tail import block_tail, fused_tail


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("eca", "residual", "activation"), FORMS)
def test_against_differences(eca, residual, activation, training):
    torch.manual_seed(0)
    bn, attention = make_modules(4, eca)
    bn.train(training)
    z, r = (make_input((2, 4, 2, 2)).requires_grad_() for _ in range(2))
    given = [z, *([r] if residual else []), *bn.parameters()]
    given += list(attention.parameters()) if eca else []

    def tail(*_):
        own = copy.copy(bn)
        own._buffers = {name: buffer.clone() for name, buffer in bn._buffers.items()}
        return fused_tail(z, own, attention, r if residual else None, activation)

    assert gradcheck(tail, given)
    assert gradgradcheck(tail, given)


def penalty(fused, bn, attention, z, residual, kept):
    """What a gradient penalty leaves in the parameters and in z; only those `kept` take part."""
    bn, attention = copy.deepcopy((bn, attention))
    for name, parameter in [*bn.named_parameters(), *attention.named_parameters()]:
        parameter.requires_grad_(name in kept)
    z, residual = (t.detach().requires_grad_() for t in (z, residual))
    out = block_tail(z, bn, attention, residual, nn.ReLU(), fused)
    gradients = torch.autograd.grad(out.square().sum(), (z, residual), create_graph=True)
    sum(g.float().square().sum() for g in gradients).backward()
    named = {**dict(bn.named_parameters()), **dict(attention.named_parameters()), "z": z}
    return [*gradients, *(t.grad for t in named.values() if t.requires_grad)]


@pytest.mark.parametrize(
    ("kept", "dtype", "tolerance"),
    [
        (("weight", "bias", "conv.weight"), torch.float64, 1e-12),
        (("conv.weight",), torch.float64, 1e-12),
        ((), torch.float64, 1e-12),
        (("weight", "bias", "conv.weight"), torch.float32, 1e-4),
        (("weight", "bias", "conv.weight"), torch.bfloat16, 0.1),
    ],
)
def test_a_gradient_penalty_is_that_of_the_modules(kept, dtype, tolerance):
    torch.manual_seed(0)
    bn, attention = make_modules(16, dtype=torch.float32 if dtype is torch.bfloat16 else dtype)
    z, r = (make_input((4, 16, 5, 5), dtype, torch.channels_last) for _ in range(2))
    if dtype is torch.bfloat16:  # ECA's own modules want one dtype
        expected = penalty(False, bn, attention, z.float(), r.float(), kept)
    else:
        expected = penalty(False, bn, attention, z, r, kept)
    found = penalty(True, bn, attention, z, r, kept)
    assert len(found) == len(expected) == 3 + len(kept)
    for one, other in zip(found, expected, strict=True):
        error = (one.double() - other.double()).norm() / other.double().norm()
        assert error < tolerance


def test_a_network_s_gradient_penalty():
    torch.manual_seed(0)
    network = ResNet(Bottleneck, (1, 1, 1, 1), ksize="3557", num_classes=3).double()
    images = torch.randn(4, 3, 64, 64, dtype=torch.float64)
    outcomes = []
    for fused in (True, False):
        own = copy.deepcopy(network)
        assert set_fused(own, fused)
        x = images.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(own(x).logsumexp(1).sum(), x, create_graph=True)
        gradient.square().sum().sqrt().backward()
        assert any(isinstance(module, ECALayer) for module in own.modules())
        outcomes.append(
            [gradient, *(p.grad for name, p in own.named_parameters() if "fc" not in name)]
        )
    for one, other in zip(*outcomes, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-9 * other.abs().max().item())
