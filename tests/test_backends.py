"""Kernel choice, and what is said of it."""

import pytest
import torch

from utils import backends


@pytest.fixture(autouse=True)
def restored():
    precision, benchmark = torch.get_float32_matmul_precision(), torch.backends.cudnn.benchmark
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_float32_matmul_precision(precision)
    torch.backends.cudnn.benchmark = benchmark


def test_a_seed_costs_speed_on_cuda_alone_and_that_is_said():
    (line,) = backends.configure(True, torch.device("cuda"))
    assert "faster" in line
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.backends.cudnn.benchmark
    assert torch.get_float32_matmul_precision() == "highest"
    assert backends.configure(True, torch.device("cpu")) == []


def test_without_a_seed_the_quickest_kernels_run():
    assert backends.configure(False, torch.device("cuda")) == []
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.backends.cudnn.benchmark
    assert torch.get_float32_matmul_precision() == "high"


@pytest.mark.parametrize(("amp", "dtype"), backends.DTYPES.items())
def test_autocast(amp, dtype):
    with backends.autocast(torch.device("cpu"), amp):
        assert torch.mm(torch.ones(2, 2), torch.ones(2, 2)).dtype == dtype
