"""Process-wide settings: precision, kernel choice, determinism, memory of the CPU."""

import os
from contextlib import AbstractContextManager

import torch

from utils.system.malloc import keep_freed_memory


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
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.backends.cudnn.allow_tf32 = False  # matrix products are in full float32 by default
    if device.type != "cuda":
        return []  # the CPU's kernels are the same ones
    return [
        "--seed: deterministic kernels, chosen without measuring, and no TensorFloat-32; a run "
        "without --seed is faster"
    ]


DTYPES = {"off": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(device: torch.device, amp: str) -> AbstractContextManager:
    """The context of forward and loss; `amp` is "off", "bf16" or "fp16"."""
    return torch.autocast(device.type, dtype=DTYPES[amp], enabled=amp != "off")
