"""Cuts the work of the fused tail's Triton kernels into programs.

The numbers depend on the shape alone, so that sums are added in the same order every time.
"""

import contextlib
import math
from typing import NamedTuple

import torch
import triton
from torch import Tensor

TILE = 4096  # elements that a program holds at a time
PER_THREAD = 16  # of them, so that the registers suffice; half where a thread cannot load vectors
# Programs, by estimate: the 400 to 500 that run at once on 132 multiprocessors should have several
# turns, for the last is seldom full; but parts are few where they must be added up.
REDUCE, APPLY = 4096, 8192
SMALL = {"BN": 128, "BC": 8}  # tiles of the kernels that reduce (N, C) over N
ROW = 128  # channels a program of the kernels that work along them


class Grid(NamedTuple):
    """How a pass over (N, C, H, W) is cut into programs."""

    n: int
    c: int
    hw: int
    nhwc: bool
    block_c: int
    block_p: int
    vector: int  # a power of two that divides the length of a line of memory
    splits: int  # of the pixels
    per: int  # pixels in a split, a multiple of block_p

    @classmethod
    def of(cls, z: Tensor, programs: int) -> "Grid":
        """Cuts z into about `programs` programs, by its shape alone, so that sums do not vary."""
        n, c, h, w = z.shape
        hw = h * w
        nhwc = not z.is_contiguous()
        vector = math.gcd(16, c if nhwc else hw)
        tile = TILE if vector >= 4 else TILE // 2
        if nhwc:  # a row of 64 channels is a full line of memory in 16 bits and two in 32
            block_c = min(64, triton.next_power_of_2(c))
            block_p = min(tile // block_c, triton.next_power_of_2(hw))
        else:
            block_p = min(1024, tile, triton.next_power_of_2(hw))
            block_c = min(tile // block_p, 64, triton.next_power_of_2(c))
        wanted = triton.cdiv(programs, n * triton.cdiv(c, block_c))
        per = triton.cdiv(triton.cdiv(hw, wanted), block_p) * block_p
        return cls(n, c, hw, nhwc, block_c, block_p, vector, triton.cdiv(hw, per), per)

    @property
    def programs(self) -> tuple[int, int, int]:
        return self.n, triton.cdiv(self.c, self.block_c), self.splits

    @property
    def tile(self) -> dict[str, int | bool]:
        per_thread = PER_THREAD if self.vector >= 4 else PER_THREAD // 2
        return {
            "NHWC": self.nhwc,
            "VEC": self.vector,
            "BC": self.block_c,
            "BP": self.block_p,
            "num_warps": max(1, self.block_c * self.block_p // (32 * per_thread)),
        }


def small_grid(c: int) -> tuple[int]:
    """Returns the grid of the kernels that reduce (N, C) over N."""
    return (triton.cdiv(c, SMALL["BC"]),)


def on_device_of(z: Tensor) -> contextlib.AbstractContextManager:
    """While open, z's GPU is the current one, on which Triton launches."""
    return torch.cuda.device(z.device) if z.is_cuda else contextlib.nullcontext()
