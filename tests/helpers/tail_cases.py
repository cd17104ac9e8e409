"""Block tails to compare: modules, tensors, and all that comes of a step through them."""

import copy
import itertools
import math

import pytest
import torch
from torch import nn

from models.eca_module import ECALayer
from models.fused.block_tail import block_tail, can_fuse, fused_tail
from models.fused.cpu_passes import BuildError, library

needs_compiler = pytest.mark.skipif(
    isinstance(library(), BuildError), reason=f"no compiled passes: {library()}"
)

FORMATS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}
RELU, RELU6 = math.inf, 6.0  # ceilings of the activation; None for no activation
# ECA, residual, ceiling
FORMS = list(itertools.product((True, False), (True, False), (RELU, RELU6, None)))


def make_modules(channels, eca=True, dtype=torch.float64, ksize=3, **bn_options):
    """BatchNorm with affine and running statistics that are not the initial ones, and ECA."""
    bn = nn.BatchNorm2d(channels, **bn_options).to(dtype)
    nn.init.normal_(bn.weight, std=3)  # so that values reach ReLU6's ceiling
    nn.init.normal_(bn.bias)
    if bn.running_mean is not None:
        bn.running_mean.normal_()
        bn.running_var.uniform_(0.5, 2)
    return bn, ECALayer(ksize).to(dtype) if eca else None


def make_input(shape, dtype=torch.float64, memory_format=torch.contiguous_format):
    x = 2 * torch.randn(shape, dtype=torch.float64) + 1
    return x.to(dtype).contiguous(memory_format=memory_format)


def module_of(ceiling):
    """The activation of a ceiling."""
    return {RELU: nn.ReLU, RELU6: nn.ReLU6, None: lambda: None}[ceiling]()


def run(fused, bn, attention, z, residual, ceiling, grad):
    """Output, every gradient and every buffer, by name; the modules given are left as they were."""
    bn, attention = copy.deepcopy((bn, attention))
    z = z.detach().requires_grad_()
    if residual is not None:
        residual = residual.detach().requires_grad_()
    activation = module_of(ceiling)
    if fused:
        assert can_fuse(z, bn, attention, residual, activation)
    out = (
        fused_tail(z, bn, attention, residual, ceiling)
        if fused
        else block_tail(z, bn, attention, residual, activation, fused=False)
    )
    return outcome(out, bn, attention, z, residual, grad)


def outcome(out, bn, attention, z, residual, grad):
    """What `out` and its backward pass leave behind, by name."""
    out.backward(grad.to(out.dtype))
    found = {"out": out.detach(), "z": z.grad, "weight": bn.weight.grad, "bias": bn.bias.grad}
    found |= dict(bn.named_buffers())
    if residual is not None:
        found["residual"] = residual.grad
    if attention is not None:
        found["kernel"] = attention.conv.weight.grad
    return found


def assert_close(found, expected, tolerance):
    """Relative to the largest value of each tensor."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        error = (found[name].double() - value.double()).abs().max()
        scale = value.double().abs().max().clamp_min(1e-12)
        assert error <= tolerance * scale, f"{name}: {(error / scale).item():.1e}"


def saved_bytes(function):
    """Bytes that autograd keeps for backward, each storage once."""
    storages = {}

    def pack(tensor):
        storages[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = function()
    del out
    return sum(storage.nbytes() for storage in storages.values())
