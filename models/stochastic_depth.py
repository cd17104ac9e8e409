"""Stochastic depth (Huang et al. 2016): in training, images skip blocks at random."""

from typing import Any, cast

from torch import Tensor, nn


def drop_branch(x: Tensor, rate: float) -> Tensor:
    """Sets the whole of x to 0 for some images, and divides the others by the share that is kept.

    Args:
        x: (N, C, H, W), a block's branch before it is added to the shortcut.
        rate: probability of each image to lose it, below 1.
    """
    kept = x.new_empty((len(x), 1, 1, 1)).bernoulli_(1 - rate)
    return x * kept.div_(1 - rate)


def set_drop_path(network: nn.Module, rate: float) -> None:
    """Gives the blocks their rates: from 0 at the first, in equal parts, to `rate` at the last.

    Blocks without a shortcut count, and lose nothing. Evaluation is not changed.

    Raises:
        ValueError: `rate` is not from 0 to below 1.
    """
    if not 0 <= rate < 1:
        raise ValueError(f"a rate of stochastic depth is from 0 to below 1, such as 0.05: {rate}")
    blocks = [m for m in network.modules() if hasattr(type(m), "drop_path")]
    for number, block in enumerate(blocks):
        cast(Any, block).drop_path = rate * number / max(1, len(blocks) - 1)
