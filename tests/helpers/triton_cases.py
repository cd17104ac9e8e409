"""Where the tests of the Triton operators run, and what they compare."""

import copy
import os

import pytest
import torch
from helpers import tail_cases
from helpers.tail_cases import RELU
from torch import nn

from models.eca_module import ECALayer
from models.fused.block_tail import fused_tail

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
GPU = torch.cuda.is_available()


def on_cuda(test):
    """Marks a test that needs a GPU."""
    return pytest.mark.cuda(pytest.mark.skipif(not GPU, reason="needs a CUDA device")(test))


def on_device(test):
    """Marks a test that needs a GPU, or Triton's interpreter in a process of its own."""
    reason = "no CUDA device, and not the interpreter's process"
    return pytest.mark.cuda(pytest.mark.skipif(not (GPU or INTERPRETED), reason=reason)(test))


def make_case(shape, dtype=torch.float32, memory_format=torch.contiguous_format, ksize=3):
    """Modules, and z, residual and the output's gradient."""
    bn, attention = nn.BatchNorm2d(shape[1]).to(DEVICE), ECALayer(ksize).to(DEVICE)
    nn.init.normal_(bn.weight, std=3)  # so that values reach ReLU6's ceiling
    nn.init.normal_(bn.bias)
    bn.running_mean.normal_()
    bn.running_var.uniform_(0.5, 2)
    tensors = (torch.randn(shape, device=DEVICE) for _ in range(3))
    return bn, attention, *(t.to(dtype).to(memory_format=memory_format) for t in tensors)


def outcome(bn, attention, z, residual, grad, ceiling=RELU):
    bn, attention = copy.deepcopy((bn, attention))
    z = z.detach().requires_grad_()
    residual = None if residual is None else residual.detach().requires_grad_()
    out = fused_tail(z, bn, attention, residual, ceiling)
    return tail_cases.outcome(out, bn, attention, z, residual, grad)


def exact_outcome(bn, attention, z, residual, grad, ceiling=RELU):
    """In double precision, which the kernels do not take."""
    bn, attention = copy.deepcopy((bn, attention))
    if attention is not None:
        attention.double()
    residual = None if residual is None else residual.double()
    return outcome(bn.double(), attention, z.double(), residual, grad.double(), ceiling)


def assert_close(found, exact, tolerances):
    """Relative to the largest value; a pair of tolerances: for large tensors, for small ones."""
    assert found.keys() == exact.keys()
    for name, value in exact.items():
        tolerance = tolerances[value.dim() != 4]
        error = (found[name].double() - value.double()).abs().max()
        scale = value.double().abs().max().clamp_min(1e-12)
        assert error <= tolerance * scale, f"{name}: {(error / scale).item():.1e}"


def network_step(network, x, compiled=False):
    """Logits, gradients and buffers of a training step, and the logits in eval mode after it."""
    network = copy.deepcopy(network).train()
    if compiled:
        network.compile()
    logits = network(x)
    logits.square().sum().backward()
    found = {name: p.grad for name, p in network.named_parameters()} | dict(network.named_buffers())
    return {**found, "logits": logits.detach(), "eval": network.eval()(x).detach()}
