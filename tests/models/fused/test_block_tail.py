"""The fused tail against the modules it stands for."""

import copy
import itertools

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
    run,
    saved_bytes,
)
from torch import nn

from models.fused.block_tail import fused_tail

pytestmark = pytest.mark.usefixtures("seeded", "operations")


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("eca", "residual", "ceiling"), FORMS)
@pytest.mark.parametrize("memory_format", FORMATS)
def test_equals_the_modules_in_double_precision(memory_format, eca, residual, ceiling, training):
    bn, attention = make_modules(10, eca)
    bn.train(training)
    z, r = (make_input((3, 10, 7, 5), memory_format=FORMATS[memory_format]) for _ in range(2))
    given = (bn, attention, z, r if residual else None, ceiling, torch.randn_like(z))
    assert_close(run(True, *given), run(False, *given), 1e-12)


@pytest.mark.parametrize("shape", [(1, 3, 7, 7), (2, 1, 4, 4), (5, 33, 1, 1), (1, 70, 1, 9)])
@pytest.mark.parametrize("memory_format", FORMATS)
def test_equals_the_modules_at_odd_shapes(memory_format, shape):
    bn, attention = make_modules(shape[1], ksize=5)
    z, r = (make_input(shape, memory_format=FORMATS[memory_format]) for _ in range(2))
    given = (bn, attention, z, r, RELU, torch.randn_like(z))
    assert_close(run(True, *given), run(False, *given), 1e-12)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("memory_format", FORMATS)
def test_single_precision(memory_format, training):
    bn, attention = make_modules(64, dtype=torch.float32)
    bn.train(training)
    z, r = (make_input((4, 64, 14, 14), torch.float32, FORMATS[memory_format]) for _ in range(2))
    given = (bn, attention, z, r, RELU, torch.randn_like(z))
    assert_close(run(True, *given), run(False, *given), 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("memory_format", FORMATS)
def test_half_precision_rounds_once(memory_format, dtype):
    """Against the modules in double precision on the same rounded inputs; no activation, whose
    mask would flip where rounding moves a value over zero."""
    bn, attention = make_modules(64, dtype=torch.float32)
    z, r = (make_input((4, 64, 14, 14), dtype, FORMATS[memory_format]) for _ in range(2))
    grad = torch.randn_like(z)
    found = run(True, bn, attention, z, r, None, grad)
    wide = copy.deepcopy((bn, attention))
    exact = run(False, wide[0].double(), wide[1].double(), z.double(), r.double(), None, grad)
    assert found["out"].dtype == found["z"].dtype == dtype
    assert found["weight"].dtype == torch.float32
    large = {name: found.pop(name) for name in ("out", "z", "residual")}
    half_a_digit = torch.finfo(dtype).eps / 2
    assert_close(large, {name: exact.pop(name) for name in large}, 1.01 * half_a_digit)
    assert_close(found, exact, 1e-5)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("eca", "residual", "ceiling"), FORMS)
def test_gradcheck(eca, residual, ceiling, training):
    bn, attention = make_modules(4, eca)
    bn.train(training)
    z, r = (make_input((2, 4, 3, 2)).requires_grad_() for _ in range(2))
    r = r if residual else None
    kernel = attention.conv.weight if eca else None

    def tail(z, r, *_):
        return fused_tail(z, bn, attention, r, ceiling)

    assert torch.autograd.gradcheck(tail, (z, r, bn.weight, bn.bias, kernel))


@pytest.mark.parametrize("memory_format", FORMATS)
def test_no_cancellation_where_the_mean_dwarfs_the_deviation(memory_format):
    bn, attention = make_modules(16, dtype=torch.float32)
    z = (torch.randn(4, 16, 14, 14) + 4096).contiguous(memory_format=FORMATS[memory_format])
    given = (bn, attention, z, None, None, torch.randn_like(z))
    found = run(True, *given)
    wide = copy.deepcopy((bn, attention))
    exact = run(False, wide[0].double(), wide[1].double(), z.double(), *given[3:])
    # z's own grid is 2^-11 of a deviation here; Σz² - (Σz)²/M in float32 would be off by about 1.
    assert_close(found, exact, 2e-3)


def test_weight_zero_still_has_its_gradient():
    bn, attention = make_modules(6)
    nn.init.zeros_(bn.weight)
    z, r = make_input((2, 6, 4, 4)), make_input((2, 6, 4, 4))
    given = (bn, attention, z, r, RELU, torch.randn_like(z))
    found = run(True, *given)
    assert_close(found, run(False, *given), 1e-12)
    assert found["weight"].abs().sum() > 0


def test_memory_format_is_kept_for_inputs_of_any_stride():
    bn, attention = make_modules(6)
    wide = make_input((4, 6, 8, 8), memory_format=torch.channels_last)
    cases = {
        "nhwc rows": (wide[:, :, ::2], torch.channels_last),
        "nchw rows": (wide.contiguous()[:, :, :, 1::2], torch.contiguous_format),
        "expanded": (wide[:1].expand(4, -1, -1, -1), torch.channels_last),
    }
    for z, memory_format in cases.values():
        r = torch.randn_like(z)
        given = (bn, attention, z, r, RELU, torch.randn(1, 1, 1, 1).double().expand_as(z))
        found = run(True, *given)
        assert found["out"].is_contiguous(memory_format=memory_format)
        assert_close(found, run(False, *given), 1e-12)


def test_same_bits_every_time():
    bn, attention = make_modules(32, dtype=torch.float32)
    z, r = (make_input((4, 32, 14, 14), torch.float32) for _ in range(2))
    given = (True, bn, attention, z, r, RELU, torch.randn_like(z))
    first, second = run(*given), run(*given)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_autocast_accumulates_in_single_precision():
    bn, attention = make_modules(16, dtype=torch.float32)
    conv = nn.Conv2d(8, 16, 1, bias=False)
    x = torch.randn(2, 8, 6, 6)
    with torch.autocast("cpu", torch.bfloat16):
        z = conv(x)
        out = fused_tail(z, bn, attention)
    assert z.dtype == out.dtype == torch.bfloat16
    outside = fused_tail(z.detach(), bn, attention)
    assert torch.equal(out, outside)
    out.sum().backward()
    assert conv.weight.grad.dtype == attention.conv.weight.grad.dtype == torch.float32


def test_keeps_its_input_its_output_and_vectors():
    bn, attention = make_modules(8, dtype=torch.float32)
    z, r = (torch.randn(2, 8, 16, 16, requires_grad=True) for _ in range(2))
    vectors = 16 * 2 * 8  # a few of N·C or C values, whatever the image's size
    for residual, ceiling in itertools.product((r, None), (RELU, RELU6, None)):
        kept = saved_bytes(lambda: fused_tail(z, bn, attention, residual, ceiling))  # noqa: B023
        large = (1 + (ceiling is not None)) * z.nbytes
        assert large < kept <= large + 4 * vectors
