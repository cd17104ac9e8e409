"""Averages a network's weights and BatchNorm statistics, exponentially over the steps."""

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel


def decay_at(updates: int, decay: float) -> float:
    """Returns the share of the old average in the next update, after `updates` of them.

    (1 + n) / (10 + n) until that exceeds `decay`: the average then looks back over a ninth of the
    steps done. Without such a warm-up, decays that fit long runs leave the average of a short run,
    or of the first epochs, at the weights it began with, which score as chance does.
    """
    return min(decay, (1 + updates) / (10 + updates))


class WeightAverage(AveragedModel):
    """Averages as torch's AveragedModel, with an update that suits the training step.

    AveragedModel's own waits for the GPU at each step (its counter goes to the device) and rounds
    averaged integers down, so that BatchNorm's `num_batches_tracked` would stand still; here
    counters are copied.

    Args:
        network: without any parallel wrapping; the average begins as a copy of it.
        decay: per step, see `decay_at`.
    """

    def __init__(self, network: nn.Module, decay: float):
        super().__init__(network, use_buffers=True)
        self.requires_grad_(False)
        self.decay = decay

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Takes one step towards `model`, whose tensors are those of the network in order."""
        rate = 1 - decay_at(int(self.n_averaged), self.decay)  # the counter is on the host
        pairs = zip(_tensors(self.module), _tensors(model), strict=True)
        averages, currents = [], []
        for averaged, current in pairs:
            if averaged.is_floating_point():
                averages.append(averaged)
                currents.append(current)
            else:  # a counter
                averaged.copy_(current)
        torch._foreach_lerp_(averages, currents, rate)
        self.n_averaged += 1


def _tensors(network: nn.Module) -> list[torch.Tensor]:
    return [*network.parameters(), *network.buffers()]
