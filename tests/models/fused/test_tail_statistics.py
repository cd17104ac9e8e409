"""What a tail does to BatchNorm's statistics, and what it refuses, in both forms of its code."""

import copy

import pytest
import torch
from helpers.tail_cases import (
    RELU,
    assert_close,
    make_input,
    make_modules,
    needs_compiler,
    run,
)
from torch import nn

from models.fused import cpu_passes
from models.fused.block_tail import block_tail, fused_tail

pytestmark = pytest.mark.usefixtures("seeded")


@pytest.fixture(params=["operations", "native"])
def dtype(request):
    """Of inputs that PyTorch's operations compute, or the compiled passes."""
    if request.param == "operations":
        request.getfixturevalue("operations")
        return torch.float64
    if reason := cpu_passes.why_not():
        pytest.skip(reason)
    return torch.float32


def test_running_statistics_follow_every_kind_of_momentum(dtype):
    for momentum in (0.1, 1.0, None):
        bn, attention = make_modules(6, momentum=momentum, dtype=dtype)
        plain = copy.deepcopy(bn)
        for _ in range(3):
            z = make_input((2, 6, 4, 4), dtype)
            fused_tail(z, bn, attention)
            plain(z)
        for found, expected in zip(bn.buffers(), plain.buffers(), strict=True):
            torch.testing.assert_close(found, expected)
    assert bn.num_batches_tracked == 3


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("switched", ["track_running_stats", "num_batches_tracked"])
def test_running_statistics_that_were_switched_off_later(momentum, switched, dtype):
    """By hand, as virtual adversarial training does, or without a count, as old networks are."""
    bn, _ = make_modules(6, momentum=momentum, dtype=dtype)
    setattr(bn, switched, {"track_running_stats": False, "num_batches_tracked": None}[switched])
    plain = copy.deepcopy(bn)
    z = make_input((2, 6, 4, 4), dtype)
    torch.testing.assert_close(fused_tail(z, bn, None, ceiling=None), plain(z))
    found, expected = dict(bn.named_buffers()), dict(plain.named_buffers())
    assert found.keys() == expected.keys()
    for name in found:
        torch.testing.assert_close(found[name], expected[name])


def test_a_second_derivative_is_refused_in_one_line(dtype):
    """And is that of the modules after what the line says."""
    bn, attention = make_modules(6, dtype=dtype)
    x = make_input((2, 6, 4, 4), dtype).requires_grad_()

    def penalty(fused):
        out = block_tail(x, bn, attention, None, nn.ReLU(), fused=fused)
        (slope,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
        return torch.autograd.grad(slope.square().sum(), x)[0]

    with pytest.raises(
        ValueError, match=r"^a fused block tail has no second .*set_fused\(network, F"
    ):
        penalty(True)
    assert penalty(False).abs().sum() > 0


def test_one_backward_for_passes_in_both_modes(dtype):
    """PyTorch's own BatchNorm takes the statistics of after the second pass for the first."""
    modules = make_modules(6, dtype=dtype)
    x = make_input((2, 6, 4, 4), dtype).requires_grad_()

    def loss(bn, attention, training, fused=True):
        out = block_tail(x, bn.train(training), attention, None, nn.ReLU(), fused=fused)
        return out.square().sum()

    expected = sum(
        torch.autograd.grad(loss(*copy.deepcopy(modules), training, fused=False), x)[0]
        for training in (False, True)
    )
    both = loss(*modules, training=False) + loss(*modules, training=True)
    torch.testing.assert_close(torch.autograd.grad(both, x)[0], expected)


def test_without_running_statistics_the_batch_serves_in_eval_mode_too(dtype):
    bn, attention = make_modules(6, track_running_stats=False, dtype=dtype)
    z = make_input((2, 6, 4, 4), dtype)
    for training in (True, False):
        bn.train(training)
        given = (bn, attention, z, None, RELU, torch.randn_like(z))
        assert_close(run(True, *given), run(False, *given), 1e3 * torch.finfo(dtype).eps)


def test_eval_mode_leaves_the_running_statistics_alone(dtype):
    bn, attention = make_modules(6, dtype=dtype)
    bn.eval()
    before = copy.deepcopy(list(bn.buffers()))
    fused_tail(make_input((2, 6, 4, 4), dtype), bn, attention)
    assert all(map(torch.equal, before, bn.buffers()))


def test_frozen_parameters_get_no_gradient(dtype):
    bn, attention = make_modules(6, dtype=dtype)
    bn.requires_grad_(False)
    z = make_input((2, 6, 4, 4), dtype)
    fused_tail(z, bn, attention).sum().backward()  # nothing but the kernel wants one
    assert bn.weight.grad is None
    assert bn.bias.grad is None
    assert attention.conv.weight.grad.abs().sum() > 0


def test_statistics_that_a_backward_pass_needs_may_not_change_unseen(dtype):
    """As BatchNorm in evaluation mode keeps them, and a step of training comes before backward."""
    bn, attention = make_modules(6, dtype=dtype)
    z = make_input((2, 6, 4, 4), dtype).requires_grad_()
    out = bn.eval()(z)
    fused_tail(z, bn.train(), attention)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("fused", [True, False])
def test_other_channels_are_batch_norms_own_error(fused, dtype):
    """The passes read as many parameters as z has channels."""
    modules = make_modules(4, dtype=dtype)
    with pytest.raises(RuntimeError, match="running_mean should contain 6 elements not 4"):
        block_tail(make_input((2, 6, 4, 4), dtype), *modules, fused=fused)


@needs_compiler
def test_statistics_in_half_precision_are_moved_too():
    bn, attention = make_modules(6, dtype=torch.bfloat16)
    z = make_input((2, 6, 4, 4), torch.bfloat16)
    wide = copy.deepcopy(bn).double()
    fused_tail(z, bn, attention)
    wide(z.double())
    for found, expected in zip(bn.buffers(), wide.buffers(), strict=True):
        torch.testing.assert_close(found.double(), expected.double(), rtol=2**-8, atol=2**-8)
