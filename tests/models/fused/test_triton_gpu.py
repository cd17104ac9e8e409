"""Triton on GPUs: a network on a real one, and which ones it serves; where none, the reason."""

import copy
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers.tail_cases import FORMATS, RELU6
from helpers.trees import ROOT
from helpers.triton_cases import (
    assert_close,
    exact_outcome,
    make_case,
    network_step,
    on_cuda,
    outcome,
)
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.data import DataLoader

triton = pytest.importorskip("triton", reason="Triton is not installed here")

from models.eca_module import ECALayer  # noqa: E402
from models.eca_resnet import Bottleneck, ResNet  # noqa: E402
from models.fused import block_tail, triton_tail, triton_trial  # noqa: E402
from models.fused.block_tail import fused_tail  # noqa: E402
from utils.data.loader import device_batches  # noqa: E402


@on_cuda
@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_network_under_autocast_on_a_gpu(batch, compiled, monkeypatch):
    monkeypatch.setattr(block_tail, "LARGE", {"cpu": (0, 0), "cuda": (0, 0)})
    torch.manual_seed(0)
    network = ResNet(Bottleneck, (1, 1, 1, 1), ksize="3557", num_classes=5).cuda()
    network.to(memory_format=torch.channels_last)
    x = torch.randn(batch, 3, 96, 96, device="cuda").to(memory_format=torch.channels_last)
    assert block_tail.why_not_triton(x.device, torch.bfloat16) is None
    exact = network_step(copy.deepcopy(network).double(), x.double())
    with torch.autocast("cuda", torch.bfloat16):
        found = network_step(network, x, compiled)
    assert all(value.isfinite().all() for value in found.values())
    error = (found["logits"].double() - exact["logits"]).norm() / exact["logits"].norm()
    assert error < 0.05


@on_cuda
@pytest.mark.parametrize("dtype", triton_tail.DTYPES)
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize(
    "shape", [(32, 256, 56, 56), (32, 2048, 7, 7), (64, 32, 112, 112), (1, 1280, 7, 7)]
)
def test_the_sizes_of_networks_equal_double_precision(shape, memory_format, dtype):
    torch.manual_seed(0)
    case = (*make_case(shape, dtype, FORMATS[memory_format], 5), None)  # a mask flips by rounding
    assert block_tail.on_triton(case[2])
    half_a_digit = torch.finfo(dtype).eps / 2
    tolerances = (1e-5 if dtype == torch.float32 else 1.01 * half_a_digit, 2e-5)
    assert_close(outcome(*case), exact_outcome(*case), tolerances)
    if dtype == torch.float32:
        case = (*case[:-1], RELU6)
        found, exact = outcome(*case), exact_outcome(*case)
        for name in ("out", "running_mean", "running_var"):
            assert_close({name: found[name]}, {name: exact[name]}, tolerances)


@on_cuda
def test_batches_from_a_side_stream():
    """A batch that another stream has written is complete when the kernels read it."""
    bn, attention = nn.BatchNorm2d(3).cuda(), ECALayer(3).cuda()
    images = [torch.randint(255, (16, 3, 224, 224), dtype=torch.uint8) for _ in range(4)]
    dataset = [(x, torch.zeros(16), []) for x in images]
    loader = DataLoader(dataset, batch_size=None, pin_memory=True)
    there = device_batches(loader, torch.device("cuda"))
    here = device_batches(loader, torch.device("cpu"))
    for batch, expected in zip(there, here, strict=True):
        found = fused_tail(batch.images, bn, attention)
        torch.testing.assert_close(found, fused_tail(expected.images.cuda(), bn, attention))


IMPORT = """
import sys, torch
def driver(): raise SystemExit("the driver is initialised")
torch.cuda._is_compiled, torch.cuda._device_count_nvml = lambda: True, lambda: 1
torch._C._cuda_getDeviceCount = torch._C._cuda_init = driver
import models
assert "models.fused.triton_tail" in sys.modules
"""


@pytest.mark.slow
def test_an_import_leaves_cuda_to_forked_children():
    """Once the driver is initialised, a child that is forked cannot use it."""
    done = subprocess.run([sys.executable, "-c", IMPORT], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.fixture
def gpu(monkeypatch):
    """A GPU that need not be there, and a function that says how many trials were made on it."""
    trials = []

    def no_compiler(*given):
        trials.append(1)
        raise RuntimeError("Failed to find C compiler.\nPlease specify one.")

    monkeypatch.setattr(triton_trial, "_reasons", {})
    monkeypatch.setattr(block_tail, "eca_triton", triton_tail)
    monkeypatch.setattr(triton_trial, "_of_triton", no_compiler)
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, *_, **__: tensor)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    return torch.device("cuda", 0), lambda: len(trials)


def test_where_triton_fails_the_modules_serve_and_the_reason_is_kept(gpu):
    device, trials = gpu
    with ThreadPoolExecutor(4) as pool:  # as DataParallel asks
        found = list(pool.map(lambda _: block_tail.why_not_triton(device), range(8)))
    assert found == ["RuntimeError: Failed to find C compiler."] * 8
    assert trials() == 1
    triton_trial._reasons[device, torch.bfloat16] = None
    with FakeTensorMode():
        for dtype, served in ((torch.float32, False), (torch.bfloat16, True)):
            z = torch.empty(2, 8, 5, 5, device=device, dtype=dtype)
            bn = nn.BatchNorm2d(8, device=device)
            assert block_tail.can_fuse(z, bn, ECALayer(3)) == served
    assert trials() == 1


def test_a_gpu_older_than_triton_takes_is_not_tried(gpu, monkeypatch):
    device, trials = gpu
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (6, 1))
    reason = block_tail.why_not_triton(device, torch.float16)
    assert reason == "compute capability 6.1, and Triton needs 7.0"
    assert trials() == 0


def test_what_triton_does_not_serve_has_a_reason(gpu, monkeypatch):
    device, trials = gpu
    assert block_tail.why_not_triton(torch.device("cpu")) == "they are for CUDA devices"
    assert "float64" in block_tail.why_not_triton(device, torch.float64)
    monkeypatch.setattr(block_tail, "eca_triton", None)
    monkeypatch.setattr(block_tail, "_not_imported", "Triton cannot be imported: broken")
    assert "broken" in block_tail.why_not_triton(device)
    assert trials() == 0
