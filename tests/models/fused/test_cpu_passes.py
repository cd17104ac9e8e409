"""The compiled passes against the modules in double precision, and what happens without them."""

import itertools
from unittest.mock import Mock

import pytest
import torch
from helpers.tail_cases import (
    FORMATS,
    FORMS,
    assert_close,
    make_input,
    make_modules,
    needs_compiler,
    run,
)
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import models
from models.fused import block_tail as eca_fused
from models.fused import cpu_passes
from models.fused.block_tail import block_tail
from models.fused.cpu_passes import Native, serves

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
    for shape, (eca, residual, _) in itertools.product(SHAPES, FORMS[::2]):
        if training and shape[0] * shape[2] * shape[3] == 5:
            continue  # five values a channel: 1/σ may be anything
        bn, attention = make_modules(shape[1], eca, torch.float32, ksize=5)
        bn.train(training)
        z, r = (make_input(shape, dtype, FORMATS[memory_format]) for _ in range(2))
        assert serves(z)
        grad = torch.randn_like(z)
        given = (bn, attention, z, r if residual else None, False, grad)
        found = run(True, *given)
        wide = [None if t is None else t.double() for t in (bn, attention, z, given[3])]
        exact = run(False, *wide, False, grad)
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
def test_each_pass_is_that_of_the_operations(memory_format, dtype):
    """Also with numbers that are not finite."""
    z, r, grad = (make_input((2, 19, 5, 7), dtype, FORMATS[memory_format]) for _ in range(3))
    out, whole = z.relu(), cpu_passes.Whole
    z[0, 3, 2, 1], out[1, 4, 0, 2] = torch.nan, torch.nan
    r[0, 5, 1, 1], grad[1, 6, 0, 0] = torch.inf, torch.inf
    small, one, mean = torch.randn(2, 19), torch.randn(1, 19), torch.randn(19)
    calls = {
        "means": [(z,)],
        "moments": [(z, True), (z, False)],
        "scale_and_add": itertools.product([z], [small, one], [one], [r, None], [True, False]),
        "gradient_sums": itertools.product([grad], [out, None], [z], [mean], [True, False]),
        "gradient_input": itertools.product(
            [grad], [out, None], [z], [small, one], [one, None], [small, one, None]
        ),
    }
    for name, several in calls.items():
        for given in several:
            found, expected = getattr(Native, name)(*given), getattr(whole, name)(*given)
            if torch.is_tensor(found):
                found, expected = [found], [expected]
            for a, b in zip(found, expected, strict=True):
                if name == "gradient_sums" and a is not None and a.dim() == 4 and not given[-1]:
                    continue  # not asked for
                assert (a is None) == (b is None)
                if a is not None:
                    assert a.dtype == b.dtype
                    close = {"rtol": 1e-5, "atol": 1e-5} if a.dtype == torch.float32 else {}
                    torch.testing.assert_close(a, b, equal_nan=True, **close)


@needs_compiler
@pytest.mark.parametrize("memory_format", FORMATS)
def test_no_cancellation_where_the_mean_dwarfs_the_deviation(memory_format):
    z = (1e4 + torch.randn(4, 8, 30, 31)).contiguous(memory_format=FORMATS[memory_format])
    means, mean, variance = Native.moments(z, True)
    wide = z.double()
    assert (means - wide.mean((2, 3))).abs().max() < 1e-3  # one digit at 10,000
    assert (mean - wide.mean((0, 2, 3))).abs().max() < 1e-3
    exact = wide.var((0, 2, 3), unbiased=False)
    assert (variance / exact - 1).abs().max() < 1e-3


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
            found.append(run(True, bn, attention, z, r, True, grad))
    finally:
        torch.set_num_threads(threads)
    for name, value in found[0].items():
        assert torch.equal(value, found[1][name])
        assert torch.equal(value, found[2][name])


@needs_compiler
@pytest.mark.parametrize("name", ["eca_resnet18", "eca_mobilenetv2", "resnet18"])
def test_networks_are_as_near_to_double_precision_as_with_modules(name):
    network = models.create_model(name, num_classes=7).eval()  # no dropout
    for module in network.modules():
        module.training = isinstance(module, nn.BatchNorm2d)
    x = torch.randn(4, 3, 64, 64)
    gradients = []
    for fused, dtype in ((True, torch.float32), (False, torch.float32), (False, torch.float64)):
        models.set_fused(network, fused)
        network.to(dtype).zero_grad()
        network(x.to(dtype)).square().sum().backward()
        gradients.append({k: p.grad.double() for k, p in network.named_parameters()})
    found, modules, exact = gradients
    for key, gradient in exact.items():
        off, usual = ((g[key] - gradient).norm() / gradient.norm() for g in (found, modules))
        assert off <= 4 * usual + 1e-5, (key, off, usual)


@needs_compiler
@pytest.mark.parametrize("name", ["eca_resnet50", "resnet50"])
def test_batch_norms_without_attention_where_the_tensor_is_large(name, monkeypatch):
    """In a block, in the stem and in the plain network's tails; modules with a hook are called."""
    network = models.create_model(name, num_classes=5).train()
    calls = Mock(wraps=eca_fused.fused_tail)
    monkeypatch.setattr(eca_fused, "fused_tail", calls)
    x = torch.randn(4, 3, 64, 64)
    models.set_fused(network, False)
    expected = network(x)
    assert not calls.called
    tails = 16 if name.startswith("eca") else 0
    models.set_fused(network, True)
    assert (network(x) - expected).norm() < 1e-3 * expected.norm()
    assert calls.call_count == tails
    monkeypatch.setattr(eca_fused, "LARGE", {"cpu": 0})
    calls.reset_mock()
    assert (network(x) - expected).norm() < 1e-3 * expected.norm()
    everywhere = 1 + 3 * 16
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
