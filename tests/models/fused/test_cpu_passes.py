"""The compiled passes against the modules in double precision, and what happens without them."""

import itertools
from unittest.mock import Mock

import pytest
import torch
from helpers.tail_cases import (
    FORMATS,
    FORMS,
    RELU,
    RELU6,
    assert_close,
    make_input,
    make_modules,
    module_of,
    needs_compiler,
    run,
)
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import models
from models.fused import block_tail as eca_fused
from models.fused import cpu_passes
from models.fused.block_tail import block_tail, fused_tail
from models.fused.cpu_passes import serves

SHAPES = ((2, 5, 3, 3), (1, 33, 7, 7), (3, 16, 1, 9), (2, 1030, 2, 3), (1, 7, 70, 60), (5, 4, 1, 1))
DTYPES = (torch.float32, torch.bfloat16)

pytestmark = pytest.mark.usefixtures("seeded")


@needs_compiler
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("memory_format", FORMATS)
def test_rounds_once(memory_format, dtype, training):
    """Every shape and form; without activation, whose mask flips where rounding crosses zero."""
    half_a_digit = torch.finfo(dtype).eps / 2
    for shape, (eca, residual, _) in itertools.product(SHAPES, FORMS[2::3]):
        if training and shape[0] * shape[2] * shape[3] == 5:
            continue  # five values a channel: 1/σ may be anything
        bn, attention = make_modules(shape[1], eca, torch.float32, ksize=5)
        bn.train(training)
        z, r = (make_input(shape, dtype, FORMATS[memory_format]) for _ in range(2))
        assert serves(z)
        grad = torch.randn_like(z)
        given = (bn, attention, z, r if residual else None, None, grad)
        found = run(True, *given)
        wide = [None if t is None else t.double() for t in (bn, attention, z, given[3])]
        exact = run(False, *wide, None, grad)
        assert found["out"].dtype == found["z"].dtype == dtype
        large = {name: found.pop(name) for name in ("out", "z", "residual") if name in found}
        tolerance = max(1.01 * half_a_digit, 1e-5)
        assert_close(large, {name: exact.pop(name) for name in large}, tolerance)
        assert_close(found, exact, 1e-5)


@needs_compiler
@pytest.mark.parametrize("wanted", [True, False])
@pytest.mark.parametrize("memory_format", FORMATS)
def test_the_activation_masks_the_gradient(memory_format, wanted):
    bn, attention = make_modules(40, dtype=torch.float32)
    z, r = (make_input((3, 40, 9, 5), torch.float32, FORMATS[memory_format]) for _ in range(2))
    z, r, grad = z.requires_grad_(), r.requires_grad_(wanted), torch.randn_like(z)
    inputs = (z, r) if wanted else (z,)
    found, exact = (
        torch.autograd.grad(block_tail(z, bn, attention, r, nn.ReLU(), fused), inputs, grad)
        for fused in (True, False)
    )
    for name, gradient in enumerate(exact):
        assert_close({name: found[name]}, {name: gradient}, 1e-5)
    assert (exact[0] != 0).any()


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("memory_format", FORMATS)
def test_numbers_that_are_not_finite_come_out_as_those_of_the_modules(memory_format, dtype):
    """In evaluation, where one does not spoil its whole channel's statistics."""
    bn, _ = make_modules(19, eca=False, dtype=torch.float32)
    bn.eval()
    z, r, grad = (make_input((2, 19, 5, 7), dtype, FORMATS[memory_format]) for _ in range(3))
    z[0, 3, 2, 1], grad[1, 6, 0, 0] = torch.nan, torch.inf
    r[0, 5, 1, 1], r[0, 5, 1, 2] = torch.inf, -torch.inf
    for ceiling in (RELU, RELU6):
        z, r = z.detach().requires_grad_(), r.detach().requires_grad_()
        results = []
        for fused in (True, False):
            out = (
                fused_tail(z, bn, None, r, ceiling)
                if fused
                else module_of(ceiling)(bn(z.float()) + r).to(dtype)
            )
            results.append((out, *torch.autograd.grad(out, (z, r), grad)))
        assert torch.equal(results[0][0].isnan(), results[1][0].isnan())
        # PyTorch's ReLU6 masks a NaN in its vector loop, and lets it through in the other.
        known = ~results[1][0].isnan()
        for found, expected in zip(*results, strict=True):
            torch.testing.assert_close(found[known], expected[known])


@needs_compiler
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("channels", [1, 3, 24, 127, 128, 200, 1025])
def test_channels_that_do_and_do_not_fill_a_row(channels, memory_format):
    """Below 128 channels several pixels are joined; the last row may be shorter."""
    for side in (1, 2, 9):
        bn, attention = make_modules(channels, dtype=torch.float32, ksize=3)
        shape = (3, channels, side, side)
        z, r = (make_input(shape, torch.float32, FORMATS[memory_format]) for _ in range(2))
        for ceiling, residual in ((RELU6, r), (None, None)):
            given = (z, residual, ceiling, torch.randn_like(z))
            wide = [None if t is None else t.double() for t in (z, residual)]
            exact = run(False, bn.double(), attention.double(), *wide, *given[2:])
            found = run(True, bn.float(), attention.float(), *given)
            assert_close(found, exact, 3e-5)


@needs_compiler
@pytest.mark.parametrize("memory_format", FORMATS)
def test_no_cancellation_where_the_mean_dwarfs_the_deviation(memory_format):
    z = (1e4 + torch.randn(4, 8, 30, 31)).contiguous(memory_format=FORMATS[memory_format])
    bn, attention = torch.nn.BatchNorm2d(8, momentum=1), make_modules(8, dtype=torch.float32)[1]
    fused_tail(z, bn, attention)
    wide = z.double()
    assert (cpu_passes.pixel_means(z) - wide.mean((2, 3))).abs().max() < 1e-3  # 1 digit at 10,000
    assert (bn.running_mean - wide.mean((0, 2, 3))).abs().max() < 1e-3
    assert (bn.running_var / wide.var((0, 2, 3)) - 1).abs().max() < 1e-3


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("memory_format", FORMATS)
def test_the_bits_do_not_depend_on_the_threads(memory_format, dtype):
    bn, attention = make_modules(70, dtype=torch.float32)
    z, r, grad = (make_input((3, 70, 9, 8), dtype, FORMATS[memory_format]) for _ in range(3))
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(run(True, bn, attention, z, r, RELU6, grad))
    finally:
        torch.set_num_threads(threads)
    for name, value in found[0].items():
        assert torch.equal(value, found[1][name])
        assert torch.equal(value, found[2][name])


@needs_compiler
@pytest.mark.parametrize("name", ["eca_resnet18", "eca_mobilenetv2"])
def test_networks_are_as_near_to_double_precision_as_with_modules(name, monkeypatch):
    """For one of three seeds: rounding may move a value through an activation's ends, with or
    without the passes, and that changes all gradients before it; a fault changes them always."""
    monkeypatch.setattr(eca_fused, "LARGE", {"cpu": (0, 0)})
    monkeypatch.setattr(eca_fused, "FEW_PIXELS", 0)
    width = {"width_mult": 0.25} if "mobilenet" in name else {}
    worst = []
    for seed in range(3):
        torch.manual_seed(seed)
        network = models.create_model(name, num_classes=7, **width).eval()  # no dropout
        for module in network.modules():
            module.training = isinstance(module, nn.BatchNorm2d)
        x = torch.randn(16, 3, 32, 32)
        gradients = []
        for fused, dtype in ((True, torch.float32), (False, torch.float32), (False, torch.float64)):
            models.set_fused(network, fused)
            network.to(dtype).zero_grad()
            network(x.to(dtype)).square().sum().backward()
            gradients.append({k: p.grad.double() for k, p in network.named_parameters()})
        found, modules, exact = gradients
        ratios = []
        for key, gradient in exact.items():
            off, usual = ((g[key] - gradient).norm() / gradient.norm() for g in (found, modules))
            ratios.append(off / (4 * usual + 1e-5))
        worst.append(max(ratios))
    assert min(worst) <= 1, worst


@needs_compiler
@pytest.mark.parametrize(
    ("shape", "layout", "pays"),  # the last in float32 and in bfloat16; with ECA always
    [
        ((1, 127, 32, 32), "NCHW", (False, False)),
        ((1, 128, 32, 32), "NCHW", (True, False)),
        ((64, 512, 2, 2), "NCHW", (True, False)),
        ((8, 128, 32, 32), "NCHW", (True, True)),
        ((1, 128, 32, 32), "NHWC", (True, True)),
        ((64, 1280, 2, 2), "NHWC", (False, False)),
    ],
)
def test_the_shape_decides_whether_the_passes_run(shape, layout, pays):
    layout = torch.channels_last if layout == "NHWC" else torch.contiguous_format
    for dtype, expected in zip(DTYPES, pays, strict=True):
        z = torch.empty(shape, dtype=dtype).contiguous(memory_format=layout)
        assert eca_fused._pays(z, attends=False) is expected
        assert eca_fused._pays(z, attends=True)


@needs_compiler
@pytest.mark.parametrize("name", ["eca_resnet18", "resnet18"])
def test_batch_norms_without_attention_where_the_tensor_is_large(name, monkeypatch):
    """In a block, in the stem and in the plain network's tails; modules with a hook are called."""
    network = models.create_model(name, num_classes=5).train()
    calls = Mock(wraps=eca_fused.fused_tail)
    monkeypatch.setattr(eca_fused, "fused_tail", calls)
    x = torch.randn(4, 3, 64, 64)
    monkeypatch.setattr(eca_fused, "LARGE", {"cpu": (0, 1 << 30)})
    models.set_fused(network, False)
    expected = network(x)
    assert not calls.called
    tails = 8 if name.startswith("eca") else 0
    models.set_fused(network, True)
    assert (network(x) - expected).norm() < 1e-3 * expected.norm()
    assert calls.call_count == tails
    monkeypatch.setattr(eca_fused, "LARGE", {"cpu": (0, 0)})
    calls.reset_mock()
    assert (network(x) - expected).norm() < 1e-3 * expected.norm()
    everywhere = 1 + 2 * 8
    assert calls.call_count == everywhere
    network.layer1[0].bn1.register_forward_hook(lambda *_: None)
    calls.reset_mock()
    network(x)
    assert calls.call_count == everywhere - 1


@pytest.mark.parametrize("native", [False, pytest.param(True, marks=needs_compiler)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("memory_format", FORMATS)
def test_finish_in_place(memory_format, dtype, native, monkeypatch):
    if not native:
        monkeypatch.setattr(cpu_passes, "serves", lambda z: False)
    z, r = (make_input((3, 6, 4, 5), dtype, FORMATS[memory_format]) for _ in range(2))
    scale = torch.rand(3, 6).to(dtype).float()  # the forms without a compiler round it to z's dtype
    for s, residual, activation in itertools.product((scale, None), (r, None), (True, False)):
        expected = z.double() * (1 if s is None else s.double()[..., None, None])
        expected = expected + (0 if residual is None else residual.double())
        expected = expected.relu() if activation else expected
        y = z.clone()
        found = cpu_passes.finish_in_place(y, s, residual, activation)
        assert not native or found.data_ptr() == y.data_ptr()
        torch.testing.assert_close(found, expected.to(dtype))


def test_means_and_finish_in_place_where_the_tensor_has_gaps():
    """A compiled loop over dense memory would write between its elements."""
    whole = torch.randn(2, 6, 4, 5)
    z, before = whole[:, ::2], whole.clone()
    means = cpu_passes.pixel_means(z)
    torch.testing.assert_close(means, whole.mean((2, 3))[:, ::2])
    found = cpu_passes.finish_in_place(z, torch.full((2, 3), 2.0), None, True)
    assert torch.equal(found, (2 * before[:, ::2]).relu())
    assert torch.equal(whole[:, 1::2], before[:, 1::2])


@needs_compiler
def test_other_tensors_are_not_served():
    z = torch.randn(2, 3, 4, 4)
    assert serves(z)
    assert serves(z.bfloat16())
    assert not serves(z.double())
    assert not serves(z.half())
    assert not serves(z.to("meta"))
    with FakeTensorMode() as mode:
        assert not serves(mode.from_tensor(z))
