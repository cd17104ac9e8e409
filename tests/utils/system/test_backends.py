"""Kernel choice, and what is said of it."""

import pytest
import torch

from utils.system import backends


@pytest.fixture(autouse=True)
def restored():
    precision, benchmark = torch.get_float32_matmul_precision(), torch.backends.cudnn.benchmark
    tf32 = torch.backends.cudnn.allow_tf32
    yield
    torch.backends.cudnn.allow_tf32 = tf32
    torch.use_deterministic_algorithms(False)
    torch.set_float32_matmul_precision(precision)
    torch.backends.cudnn.benchmark = benchmark


def test_a_seed_costs_speed_on_cuda_alone_and_that_is_said():
    torch.set_float32_matmul_precision("high")  # as a run without --seed leaves it behind
    (line,) = backends.configure(True, torch.device("cuda"))
    assert "faster" in line
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.backends.cudnn.benchmark
    assert torch.get_float32_matmul_precision() == "highest"
    assert not torch.backends.cudnn.allow_tf32
    assert torch.backends.cudnn.conv.fp32_precision != "tf32"  # torch's other switch for the same
    assert torch.backends.cuda.matmul.fp32_precision != "tf32"
    assert not torch.utils.deterministic.fill_uninitialized_memory
    assert backends.configure(True, torch.device("cpu")) == []


def test_without_a_seed_the_quickest_kernels_run():
    assert backends.configure(False, torch.device("cuda")) == []
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.backends.cudnn.benchmark
    assert torch.get_float32_matmul_precision() == "high"


def test_shapes_that_change_are_not_measured():
    backends.configure(False, torch.device("cuda"), one_shape=False)
    assert not torch.backends.cudnn.benchmark


@pytest.mark.parametrize(("amp", "dtype"), backends.DTYPES.items())
def test_autocast(amp, dtype):
    with backends.autocast(torch.device("cpu"), amp):
        assert torch.mm(torch.ones(2, 2), torch.ones(2, 2)).dtype == dtype
