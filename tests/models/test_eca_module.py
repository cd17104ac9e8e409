"""The ECA layer against its equation, its shapes and formats, and the reading of kernel sizes."""

import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from models.eca_module import ECALayer, adaptive_kernel_size, parse_ksize

SHAPES = [(2, 6), (2, 6, 7), (2, 6, 5, 4), (2, 6, 3, 5, 4)]


def slow_eca(x, weight):
    """Eq. 9, element by element, in Python floats."""
    out = torch.empty_like(x)
    reach = len(weight) // 2
    for n, image in enumerate(x):
        means = [sum(channel.flatten().tolist()) / channel.numel() for channel in image]
        for c in range(len(means)):
            z = sum(
                weight[j] * means[c + j - reach]
                for j in range(len(weight))
                if 0 <= c + j - reach < len(means)
            )
            out[n, c] = image[c] / (1 + math.exp(-z))
    return out


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("k", [1, 3, 5, 13])  # 13 reaches past both ends of 6 channels
def test_equals_the_equation(shape, k):
    torch.manual_seed(k)
    layer = ECALayer(k).double()
    x = torch.randn(shape, dtype=torch.float64)
    expected = slow_eca(x, layer.conv.weight.flatten().tolist())
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("shape", SHAPES)
def test_gradients(shape):
    torch.manual_seed(0)
    layer = ECALayer(3).double()
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, (x,))
    layer(x).square().sum().backward()
    assert layer.conv.weight.grad.abs().min() > 0


def test_one_parameter_of_k_weights_with_torchs_own_initialisation():
    torch.manual_seed(0)
    layer = ECALayer(7)
    assert {name: tuple(p.shape) for name, p in layer.state_dict().items()} == {
        "conv.weight": (1, 1, 7)
    }
    torch.manual_seed(0)
    assert torch.equal(layer.conv.weight, torch.nn.Conv1d(1, 1, 7, bias=False).weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_autocast(dtype, shape):
    torch.manual_seed(0)
    layer = ECALayer(5)
    x = torch.randn(shape).to(dtype)
    with torch.autocast("cpu", dtype):
        out = layer(x)
    assert out.dtype == dtype
    torch.testing.assert_close(out.float(), layer(x.float()), rtol=0.02, atol=0.02)


@pytest.mark.parametrize(
    ("shape", "memory_format"),
    [((2, 6, 5, 4), torch.channels_last), ((2, 6, 3, 5, 4), torch.channels_last_3d)],
)
def test_keeps_the_memory_format(shape, memory_format):
    layer = ECALayer(3)
    x = torch.randn(shape)
    out = layer(x.contiguous(memory_format=memory_format))
    assert out.is_contiguous(memory_format=memory_format)
    torch.testing.assert_close(out, layer(x))


@pytest.mark.parametrize("shape", SHAPES)
def test_compiles_whole(shape):
    layer = ECALayer(3)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x = torch.randn(shape)
    torch.testing.assert_close(compiled(x), layer(x))


@pytest.mark.parametrize("shape", SHAPES)
def test_empty_batch(shape):
    assert ECALayer(3)(torch.empty(0, *shape[1:])).shape == (0, *shape[1:])


@pytest.mark.parametrize("k", [0, -3, 2, 4, 3.0, "3", None, True])
def test_refuses_a_kernel_size_that_is_not_odd_and_positive(k):
    with pytest.raises(ValueError, match="odd positive integer such as 3, not "):
        ECALayer(k)


@pytest.mark.parametrize("shape", [(), (6,), (1, 2, 3, 4, 5, 6)])
def test_refuses_another_rank(shape):
    with pytest.raises(ValueError, match=r"takes \(N, C\) to"):
        ECALayer(3)(torch.zeros(shape))


def test_adaptive_kernel_size():
    expected = {1: 1, 16: 3, 24: 3, 64: 3, 96: 3, 128: 5, 160: 5, 256: 5, 512: 5, 1024: 5, 2048: 7}
    assert {c: adaptive_kernel_size(c) for c in expected} == expected
    assert adaptive_kernel_size(256, gamma=1) == 9
    assert adaptive_kernel_size(64, b=5) == 5
    for bad in ({"channels": 0}, {"channels": 64, "gamma": 0}):
        with pytest.raises(ValueError, match="at least 1 and gamma above 0"):
            adaptive_kernel_size(**bad)


@pytest.mark.parametrize(
    ("ksize", "stages", "expected"),
    [
        ("3557", 4, (3, 5, 5, 7)),
        (" 3, 5,5,11 ", 4, (3, 5, 5, 11)),
        ([3, 5, 5, 11], 4, (3, 5, 5, 11)),
        ((9, 9, 9, 9), 4, (9, 9, 9, 9)),
        ("13", 2, (1, 3)),
        ("13", (2, 7), (1, 3)),
        ("3333355", (2, 7), (3, 3, 3, 3, 3, 5, 5)),
        ("adaptive", 4, "adaptive"),
        ("adaptive", 2, "adaptive"),
    ],
)
def test_parse_ksize(ksize, stages, expected):
    assert parse_ksize(ksize, stages) == expected


BAD_TEXT = ["355", "35577", "3546", "abc", "0", "-3557", "3.5.5.7", "3²57", "Adaptive"]
BAD_TEXT += ["", "3,5,5", "3,5,5,", "3,5,5,x", "3,5,5,-7", "3,5,5,4"]
BAD_SEQUENCES = [[3, 5, 5], [3, 5, 4, 7], [3, 5, 5, -7], [3.0, 5, 5, 7], [True] * 4, 3557, None]


@pytest.mark.parametrize("ksize", BAD_TEXT + BAD_SEQUENCES)
def test_parse_ksize_refuses_with_an_example(ksize):
    with pytest.raises(ValueError, match="4 odd kernel sizes: write for example 3557") as caught:
        parse_ksize(ksize)
    assert "\n" not in str(caught.value)


def test_the_example_for_two_stages_is_valid_for_two_stages():
    with pytest.raises(ValueError, match="2 odd kernel sizes: write for example 13 or 1,3"):
        parse_ksize("3557", stages=2)


def test_the_file_works_alone(tmp_path):
    source = Path(__file__).parents[2] / "models" / "eca_module.py"
    shutil.copy(source, tmp_path / "eca_module.py")
    program = (
        "import sys, torch; from eca_module import ECALayer, adaptive_kernel_size;"
        "assert 'models' not in sys.modules;"
        "print(tuple(ECALayer(adaptive_kernel_size(64))(torch.ones(2, 64, 8, 8)).shape))"
    )
    run = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "(2, 64, 8, 8)"
