"""Measures on a GPU how fast a network's block tails are as `block_tail` runs them.

For GPUs the rule by which `block_tail` chooses is an estimate. So each tail of the network is timed
at its own shape, forward and backward, on the device and on the host, which may be the slower one.
"""

import copy
import statistics
import time
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn

from ..eca_module import ECALayer
from . import block_tail as tails

WARM_UPS, REPEATS = 3, 10
SLEEP = 2_000_000  # clock cycles, about a millisecond


class Tail(NamedTuple):
    """One form of a block's end."""

    shape: torch.Size
    taps: int  # of ECA's kernel; 0 without
    residual: bool
    ceiling: float | None


def tails_of(network: nn.Module, size: tuple[int, int, int, int]) -> Counter[Tail]:
    """Counts the tails that images (N, C, H, W) of `size` go through, on tensors without data."""
    seen: Counter[Tail] = Counter()

    def note(z, bn, attention, residual, activation) -> None:  # type: ignore[no-untyped-def]
        taps = 0 if attention is None else attention.conv.weight.numel()
        seen[Tail(z.shape, taps, residual is not None, tails.ceiling_of(activation))] += 1

    meta = copy.deepcopy(network).to("meta").train()
    tails.listener = note
    try:
        with torch.no_grad():
            meta(torch.empty(size, device="meta"))
    finally:
        tails.listener = None
    return seen


def speed(
    network: nn.Module,
    size: tuple[int, int, int, int],
    dtype: torch.dtype,
    layout: torch.memory_format,
    device: torch.device,
) -> float:
    """Returns the speed of a training step's tails over that of their modules.

    Of the device's and the host's time, sums over the tails of medians, the larger counts.
    """
    totals = {True: [0.0, 0.0], False: [0.0, 0.0]}
    for tail, count in tails_of(network, size).items():
        steps = {fused: _step(tail, fused, dtype, layout, device) for fused in totals}
        times: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
        for turn in range(WARM_UPS + REPEATS):
            for fused in (turn % 2 == 0, turn % 2 == 1):
                times[fused].append(clock(steps[fused], device))
        for fused, total in totals.items():
            for kind, found in enumerate(zip(*times[fused][WARM_UPS:], strict=True)):
                total[kind] += count * statistics.median(found)
    torch.cuda.empty_cache()  # which training deals out otherwise
    return max(totals[False]) / max(totals[True])


def _step(
    tail: Tail, fused: bool, dtype: torch.dtype, layout: torch.memory_format, device: torch.device
) -> Callable[[], None]:
    """Returns a function that runs a tail forward and backward on numbers of its own."""
    chance = torch.Generator(device).manual_seed(0)  # nobody else's numbers change

    def drawn() -> torch.Tensor:
        numbers = torch.randn(tail.shape, generator=chance, device=device, dtype=dtype)
        return numbers.to(memory_format=layout)

    bn = nn.BatchNorm2d(tail.shape[1]).to(device)
    with torch.random.fork_rng(devices=()):
        eca = ECALayer(tail.taps).to(device) if tail.taps else None
    activation = {None: None, 6.0: nn.ReLU6(True)}.get(tail.ceiling, nn.ReLU(True))
    z, grad = drawn().requires_grad_(), drawn()
    residual = drawn().requires_grad_() if tail.residual else None
    tensors = (z, residual, *bn.parameters(), *(eca.parameters() if eca else ()))
    inputs = [tensor for tensor in tensors if tensor is not None]

    def step() -> None:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            out = tails.block_tail(z, bn, eca, residual, activation, fused)
        torch.autograd.grad(out, inputs, grad)

    return step


def clock(step: Callable[[], None], device: torch.device) -> tuple[float, float]:
    """Returns the seconds that a step takes the device, and the host to launch it."""
    with torch.cuda.device(device):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        torch.cuda._sleep(SLEEP)  # the launches queue up meanwhile
        begin.record()
        began = time.perf_counter()
        step()
        host = time.perf_counter() - began
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1000, host
