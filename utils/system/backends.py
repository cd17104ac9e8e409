"""Sets what holds for the whole process: precision, kernels, determinism, memory of the CPU."""

import ctypes
import os
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch


def configure(deterministic: bool, device: torch.device, one_shape: bool = True) -> list[str]:
    """Chooses kernels; returns what a user should know of the choice.

    Args:
        deterministic: the same bits every time, from kernels that may be slower and in full
            float32; otherwise cuDNN measures which kernels are quickest, and float32 matrix
            products may use TensorFloat-32.
        one_shape: the batches are of one shape. cuDNN would measure anew for every other one, and
            does not measure where they differ.
    """
    if device.type == "cpu":
        keep_freed_memory()
    torch.backends.cudnn.benchmark = one_shape and not deterministic
    if not deterministic:
        torch.set_float32_matmul_precision("high")
        return []
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    # Not NaN into every new tensor: that finds reads of what was never written, at a pass for each.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")  # whatever ran earlier in this process
    if device.type != "cuda":
        return []  # the CPU's kernels are the same ones
    return [
        "--seed: deterministic kernels, chosen without measuring, and no TensorFloat-32; a run "
        "without --seed is faster"
    ]


AutocastFactory = Callable[[], AbstractContextManager]  # of the context in which a network runs
DTYPES = {"off": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(device: torch.device, amp: str) -> AbstractContextManager:
    """Returns the context of forward and loss; `amp` is "off", "bf16" or "fp16"."""
    return torch.autocast(device.type, dtype=DTYPES[amp], enabled=amp != "off")


M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # of malloc.h


TOP_PAD = 64 << 20  # bytes that are taken from the system at a time


def keep_freed_memory() -> bool:
    """Lets this process hold on to freed memory instead of handing it back to the system.

    By default glibc maps every large tensor afresh and unmaps it when freed, so the system zeroes
    its pages again at every step: a third of a CPU step's time and more. Call it before tensors
    are made. Forked workers inherit it.

    Returns:
        Whether the allocator took it; other systems' allocators do not, and need it less.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library
        return False
    largest = 2**31 - 1
    options = ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, largest), (M_TOP_PAD, TOP_PAD))
    taken = [mallopt(name, value) for name, value in options]  # each, whatever the first says
    return all(taken)
