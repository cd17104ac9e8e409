"""The operators on Triton kernels: on a GPU where there is one, else through Triton's interpreter.

The interpreter must be chosen before Triton is imported, so those tests run in a process of their
own: `test_the_kernels_through_the_interpreter` starts it on this very file and the one of GPUs.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import tail_cases
from helpers.tail_cases import FORMATS, FORMS
from helpers.triton_cases import (
    DEVICE,
    INTERPRETED,
    assert_close,
    exact_outcome,
    make_case,
    network_step,
    on_device,
    outcome,
)
from torch import nn

triton = pytest.importorskip("triton", reason="Triton is not installed here")
import triton.language as tl  # noqa: E402

from models.eca_resnet import BasicBlock, Bottleneck, ResNet  # noqa: E402
from models.fused import block_tail, cpu_passes, triton_kernels, triton_tail, triton_trial  # noqa: E402
from models.fused.block_tail import fused_tail  # noqa: E402

ALL_SHAPES = triton_trial.TRIAL_SHAPES
if INTERPRETED:  # which takes a minute for all
    triton_trial.TRIAL_SHAPES = ((2, 20, 5, 7),)


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter's process")
def test_the_kernels_through_the_interpreter():
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider"]
    files = [__file__, Path(__file__).with_name("test_triton_gpu.py")]
    done = subprocess.run([*command, *files], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert re.search(r"\b[1-9]\d+ passed", done.stdout), done.stdout


@pytest.fixture
def operators(monkeypatch):
    """Every tail goes through the operators, on a CPU too, once they have been tried."""

    def on_triton(z):
        return z.dtype in triton_tail.DTYPES and triton_trial.why_not(z.device, z.dtype) is None

    torch.manual_seed(0)
    device = torch.zeros((), device=DEVICE).device
    assert [triton_trial.why_not(device, dtype) for dtype in triton_tail.DTYPES] == [None] * 3
    monkeypatch.setattr(block_tail, "eca_triton", triton_tail)
    monkeypatch.setattr(block_tail, "on_triton", on_triton)
    monkeypatch.setattr(cpu_passes, "serves", lambda z: False)
    # In TF32 a convolution would blow up differences in the last bit of what it reads.
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture
def calls(operators, monkeypatch):
    """How often each operator has been called."""
    found = {"forward": 0, "backward": 0}

    def counted(name, function):
        def call(*given):
            found[name] += 1
            return function(*given)

        return call

    for name in found:
        function = getattr(triton_tail, f"tail_{name}")
        monkeypatch.setattr(triton_tail, f"tail_{name}", counted(name, function))
    return found


@on_device
@pytest.mark.parametrize(("eca", "residual", "ceiling"), FORMS)
@pytest.mark.parametrize("memory_format", FORMATS)
def test_equals_double_precision(memory_format, eca, residual, ceiling, calls):
    # Running statistics where one more flag would make the table twice as long.
    bn, attention, z, r, grad = make_case((2, 20, 5, 7), memory_format=FORMATS[memory_format])
    bn.train(residual == (memory_format == "nchw"))
    case = (bn, attention if eca else None, z, r if residual else None, grad, ceiling)
    found = outcome(*case)
    assert calls == {"forward": 1, "backward": 1}
    assert_close(found, exact_outcome(*case), (1e-5, 1e-5))
    assert calls == {"forward": 1, "backward": 1}
    assert found["out"].is_contiguous(memory_format=FORMATS[memory_format])
    assert found["z"].is_contiguous(memory_format=FORMATS[memory_format])


@on_device
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("memory_format", FORMATS)
def test_half_precision_rounds_once(memory_format, dtype, calls):
    case = make_case((2, 64, 7, 7), dtype, FORMATS[memory_format])
    case = (*case, None)  # no activation, whose mask flips where rounding crosses zero
    half_a_digit = torch.finfo(dtype).eps / 2
    if INTERPRETED and dtype == torch.bfloat16:
        half_a_digit *= 2  # the interpreter cuts the digits off where a GPU rounds
    assert_close(outcome(*case), exact_outcome(*case), (1.01 * half_a_digit, 1e-5))


@on_device
@pytest.mark.parametrize(
    ("shape", "ksize"),
    [((1, 3, 7, 7), 9), ((2, 1, 4, 4), 1), ((5, 33, 1, 1), 3), ((1, 130, 1, 9), 7)],
)
def test_odd_shapes(shape, ksize, calls):
    for memory_format in FORMATS.values():
        case = make_case(shape, memory_format=memory_format, ksize=ksize)
        assert_close(outcome(*case), exact_outcome(*case), (2e-5, 2e-5))
    assert calls["backward"] == len(FORMATS)


@on_device
@pytest.mark.parametrize("view", ["strided", "expanded"])
@pytest.mark.parametrize("training", [True, False])
def test_parameters_that_are_views(view, training, calls):
    """Kernels walk from one channel to the next, whatever a parameter's stride is."""
    bn, attention, z, r, grad = make_case((2, 20, 5, 7), ksize=5)
    bn.train(training)

    def viewed(tensor):
        if view == "expanded":
            return tensor.flatten()[:1].detach().expand(tensor.numel()).view(tensor.shape)
        return torch.stack([tensor.detach()] * 2, -1).add(torch.tensor([0.0, 9], device=DEVICE))[
            ..., 0
        ]

    for module, names in ((bn, ("weight", "bias")), (attention.conv, ("weight",))):
        for name in names:
            setattr(module, name, nn.Parameter(viewed(getattr(module, name))))
            assert getattr(module, name).stride(-1) != 1
    if view == "strided":
        bn.running_mean, bn.running_var = viewed(bn.running_mean), viewed(bn.running_var)
    exact = exact_outcome(bn, attention, z, r, grad)  # of copies, which are dense
    z, r = z.requires_grad_(), r.requires_grad_()
    out = fused_tail(z, bn, attention, r)
    assert_close(tail_cases.outcome(out, bn, attention, z, r, grad), exact, (1e-5, 1e-5))


@on_device
@pytest.mark.parametrize("memory_format", FORMATS)
def test_pixels_split_among_programs(memory_format, calls, monkeypatch):
    """Splits of unequal size, more than one tile in each, and a last tile that is not full."""
    monkeypatch.setattr(triton_tail, "TILE", 64 if memory_format == "nchw" else 512)
    bn, attention, z, r, grad = make_case((1, 10, 15, 17), memory_format=FORMATS[memory_format])
    blocks = triton_tail.Grid.of(z, 1).programs[0]  # of the one sample
    monkeypatch.setattr(triton_tail, "REDUCE", 2 * blocks)
    monkeypatch.setattr(triton_tail, "APPLY", 2 * blocks)
    grid = triton_tail.Grid.of(z, triton_tail.REDUCE)
    assert grid.splits > 1
    assert grid.per > grid.block_p
    assert grid.hw % grid.per % grid.block_p
    case = (bn, attention, z, r, grad)
    assert_close(outcome(*case), exact_outcome(*case), (1e-5, 1e-5))


@triton.jit
def parts(out, c, BC: tl.constexpr):
    i, channel, n = triton_kernels._part(c, BC)
    at = out + (tl.program_id(0) * 3) * BC + tl.arange(0, BC)
    tl.store(at, channel)
    tl.store(at + BC, channel * 0 + i)
    tl.store(at + 2 * BC, channel * 0 + n)


@on_device
def test_programs_that_run_together_share_a_sample():
    """Blocks of its channels lie side by side in memory."""
    found = torch.full((6, 3, 64), -1, dtype=torch.int32, device=DEVICE)
    parts[(6,)](found, 130, BC=64)
    assert found[:, 0, 0].tolist() == [0, 64, 128] * 2
    assert found[:, 0, 63].tolist() == [63, 127, 191] * 2
    assert found[:, 1, 0].tolist() == [0, 0, 0, 1, 1, 1]
    assert found[:, 2].eq(2).all()


@on_device
@pytest.mark.parametrize("tile", [4096, 64])
@pytest.mark.parametrize("memory_format", FORMATS)
def test_no_cancellation_where_the_mean_dwarfs_the_deviation(
    memory_format, tile, calls, monkeypatch
):
    monkeypatch.setattr(triton_tail, "TILE", tile)
    monkeypatch.setattr(triton_tail, "REDUCE", 1)
    monkeypatch.setattr(
        triton_tail.Grid, "cut", triton_tail.Grid.cut.__wrapped__.__get__(triton_tail.Grid)
    )
    bn, attention, z, _, grad = make_case((4, 16, 9, 9), memory_format=FORMATS[memory_format])
    assert (triton_tail.Grid.of(z, 1).block_p < 81) == (tile == 64)
    case = (bn, attention, z + 4096, None, grad, None)
    # z's own grid is 2^-11 of a deviation here; Σz² - (Σz)²/M in float32 would be off by about 1.
    assert_close(outcome(*case), exact_outcome(*case), (5e-3, 5e-3))


@on_device
@pytest.mark.parametrize(("block", "tails"), [(BasicBlock, 3), (Bottleneck, 4)])
def test_the_batch_norms_inside_blocks_too(block, tails, calls, monkeypatch):
    """The stem's, and one or two before the block's tail; if large enough, and without hooks."""
    network = ResNet(block, (1, 0, 0, 0), ksize="3333", num_classes=5).to(DEVICE)
    x = torch.randn(2, 3, 12, 12, device=DEVICE).to(memory_format=torch.channels_last)
    block_tail.set_fused(network, False)
    plain = network_step(network, x)
    block_tail.set_fused(network, True)
    assert calls == {"forward": 0, "backward": 0}
    network_step(network, x)
    assert calls == {"forward": 2, "backward": 1}  # all the tail's, in train and in eval mode
    monkeypatch.setattr(block_tail, "LARGE", {"cpu": (0, 0), "cuda": (0, 0)})
    found = network_step(network, x)
    assert calls == {"forward": 2 + 2 * tails, "backward": 1 + tails}
    assert_close(found, plain, (1e-4, 1e-4))
    seen = []
    for relu in (network.relu, network.layer1[0].relu):
        relu.register_forward_hook(lambda *_: seen.append(1))
    network(x)
    assert len(seen) == tails
    assert calls["forward"] == 2 + 2 * tails


@on_device
def test_autocast_keeps_what_is_small_in_single_precision(calls):
    bn, attention, x, _, _ = make_case((2, 16, 6, 6))
    conv = nn.Conv2d(16, 16, 1, bias=False).to(DEVICE)
    with torch.autocast(DEVICE, torch.bfloat16):
        z = conv(x)
        out = fused_tail(z, bn, attention)
    assert z.dtype == out.dtype == torch.bfloat16
    bn.reset_running_stats()
    assert torch.equal(out, fused_tail(z.detach(), bn, attention))
    out.sum().backward()
    assert conv.weight.grad.dtype == attention.conv.weight.grad.dtype == torch.float32
    assert calls == {"forward": 2, "backward": 1}


@on_device
def test_same_bits_every_time(operators):
    case = make_case((2, 16, 14, 14), memory_format=torch.channels_last)
    first, second = outcome(*case), outcome(*case)
    assert all(torch.equal(first[name], second[name]) for name in first)


@on_device
def test_gradients_of_any_stride(calls):
    bn, attention, z, r, _ = make_case((2, 8, 6, 6), memory_format=torch.channels_last)
    case = (bn, attention, z, r.contiguous(), torch.ones(1, device=DEVICE).expand_as(z))
    assert_close(outcome(*case), exact_outcome(*case), (1e-5, 1e-5))


@on_device
def test_only_the_wanted_gradients(operators):
    bn, attention, z, r, _ = make_case((2, 8, 6, 6))
    bn.requires_grad_(False)
    fused_tail(z, bn, attention, r).sum().backward()
    assert bn.weight.grad is None
    found = attention.conv.weight.grad.clone()
    attention.zero_grad()
    fused_tail(z, bn, attention, r.requires_grad_()).sum().backward()
    assert torch.equal(attention.conv.weight.grad, found)
    assert r.grad is not None


@on_device
def test_operators_keep_torchs_rules(operators):
    """Schemas, fake tensors and tracing, by torch's own checker."""
    bn, attention, z, r, grad = make_case((2, 8, 5, 5), memory_format=torch.channels_last)
    kernel = attention.conv.weight.detach().flatten()
    weight, bias = bn.weight.detach(), bn.bias.detach()
    statistics = (bn.running_mean, bn.running_var)
    checks = ("test_schema", "test_faketensor")
    for k, s, x in ((kernel, statistics, r), (None, (None, None), None)):
        given = (z, weight, bias, k, x, *s, 1e-5, 6.0)
        torch.library.opcheck(torch.ops.eca_net.tail_forward, given, test_utils=checks)
        out, mean, _, inverse_std, pooled, gate = torch.ops.eca_net.tail_forward(*given)
        mean = mean if s[0] is None else s[0]
        for masked, want in ((out, True), (None, False)):
            given = (grad, z, masked, weight, bias, k, mean, inverse_std, pooled, gate)
            given = (*given, s[0] is None, want, want, 6.0 if want else None)
            torch.library.opcheck(torch.ops.eca_net.tail_backward, given, test_utils=checks)


@on_device
def test_a_mean_without_its_variance_is_refused(operators):
    bn, _, z, _, _ = make_case((2, 8, 5, 5))
    weight, bias, mean = bn.weight.detach(), bn.bias.detach(), bn.running_mean
    for statistics in ((mean, None), (None, mean)):
        with pytest.raises(ValueError, match="together"):
            triton_tail.tail_forward(z, weight, bias, None, None, *statistics, 1e-5, None)


@on_device
def test_compiles_into_one_graph(operators, monkeypatch):
    bn, attention, z, r, grad = make_case((2, 8, 5, 5), memory_format=torch.channels_last)
    expected = outcome(bn, attention, z, r, grad)
    monkeypatch.setattr(triton_trial, "_reasons", {})  # whether Triton works, the compiler must ask
    z.requires_grad_()
    out = torch.compile(fused_tail, backend="aot_eager", fullgraph=True)(z, bn, attention, r)
    out.backward(grad)
    assert torch.equal(out, expected["out"])
    assert torch.equal(z.grad, expected["z"])
    assert torch.equal(bn.weight.grad, expected["weight"])
    # The compiler's graph may round the update of the buffer otherwise (PyTorch 2.10 does).
    torch.testing.assert_close(bn.running_var, expected["running_var"])
    assert triton_trial._reasons == {(z.device, z.dtype): None}


def spoiled(name):
    """A function of triton_tail with a fault planted in it, or in what it is given."""
    true = getattr(triton_tail, name)
    faults = {
        "_limit": lambda ceiling: 5.0 if ceiling == 6.0 else true(ceiling),
        "_gate": lambda means, mean, inverse_std, weight, bias, kernel: true(
            means, mean, inverse_std, weight, bias, kernel.flip(0)
        ),
        "_apply": lambda *given: true(*given).mul_(1.0 + 2**-5),
        "_gradient_sums": lambda grad, out, *rest: true(grad, None, *rest),
        "_parameter_gradients": lambda rows, std, normalised: true(rows, std, not normalised),
        "_gradient_input": lambda *given: true(*given[:-2], not given[-2], given[-1]),
        "_statistics": lambda z, mean, variance, std, eps, batch: true(
            z, mean, variance, std, eps + 0.1, batch
        ),
    }
    return faults[name]


@on_device
@pytest.mark.parametrize(
    "name",
    [
        "_limit",
        "_gate",
        "_apply",
        "_gradient_sums",
        "_parameter_gradients",
        "_gradient_input",
        "_statistics",
    ],
)
def test_the_trial_finds_a_planted_fault(name, monkeypatch):
    device = torch.device(DEVICE)
    monkeypatch.setattr(triton_trial, "_reasons", {})
    assert triton_trial.why_not(device, torch.float32) is None
    monkeypatch.setattr(triton_trial, "_reasons", {})
    monkeypatch.setattr(triton_tail, name, spoiled(name))
    assert triton_trial.why_not(device, torch.float32).endswith("is wrong on this device")


@on_device
def test_the_trial_passes_on_all_its_shapes_and_leaves_chance_alone(monkeypatch):
    monkeypatch.setattr(triton_trial, "_reasons", {})
    monkeypatch.setattr(triton_trial, "TRIAL_SHAPES", ALL_SHAPES)
    before = torch.get_rng_state()
    assert triton_trial.why_not(torch.device(DEVICE), torch.float32) is None
    assert torch.equal(torch.get_rng_state(), before)
