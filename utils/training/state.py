"""Holds all that training changes, as one object that is saved and restored bit for bit.

Beside it, the average of the weights, and the guard that no number that is not finite passes.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from utils.runs.checkpoint import SavedRun
from utils.system import distributed
from utils.system.errors import EXIT_NON_FINITE, UserError
from utils.training.optim import load_optimizer_state

EMPTY: Mapping[str, Any] = MappingProxyType({})


class NonFiniteGuard:
    """Stops a loss that is not a finite number before it reaches the weights.

    On the CPU the step stops at once. On a GPU, asking would wait for the device at every step:
    there the flag is handed to a fused optimizer, which skips its update on the device, and
    `check` raises at the next moment that synchronises anyway, before anything is saved. An
    optimizer without such a kernel (LAMB) has to wait.

    Args:
        what: names what is checked.
        warmup_flag: what the remedy calls the length of the warm-up.
    """

    def __init__(
        self, device: torch.device, what: str = "loss", warmup_flag: str = "--warmup-epochs"
    ):
        self.what, self.warmup_flag = what, warmup_flag
        self.first_bad = torch.full((), -1, dtype=torch.int64, device=device)
        self.wait = device.type != "cuda"

    def before_update(
        self, value: torch.Tensor, step: int, optimizer: torch.optim.Optimizer
    ) -> None:
        """Checks loss or gradient norm; to be called between backward and `optimizer.step()`."""
        bad = distributed.all_reduce((~value.detach().isfinite()).float())
        fresh = (bad > 0) & (self.first_bad < 0)
        self.first_bad = torch.where(fresh, step, self.first_bad)
        if self.wait or not optimizer.defaults.get("fused"):
            self.check()
        else:
            optimizer.found_inf = bad.clamp_(max=1)  # type: ignore[attr-defined]  # fused kernels read it

    def check(self) -> None:
        """Raises when a value was not finite. Synchronises with the device.

        Raises:
            UserError: names the step, with exit code 3.
        """
        step = int(self.first_bad)
        if step >= 0:
            raise UserError(
                f"the {self.what} of step {step + 1} is not a finite number; the weights were left "
                f"as they were before it. Lower --lr, lengthen {self.warmup_flag}, or use --amp "
                "off",
                EXIT_NON_FINITE,
            )


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
        """Takes one step towards `model`, whose tensors are those of the network in order.

        Raises:
            UserError: they are other ones. torch's kernels do not look: they spread a smaller
                tensor over a larger one.
        """
        rate = 1 - decay_at(int(self.n_averaged), self.decay)  # the counter is on the host
        ours, theirs = _tensors(self.module), _tensors(model)
        if [(t.shape, t.dtype) for t in ours] != [(t.shape, t.dtype) for t in theirs]:
            raise UserError(
                "the averaged weights are not those of the network that is trained: resume the run "
                "with its own flags"
            )
        averages, currents = [], []
        for averaged, current in zip(ours, theirs, strict=True):
            if averaged.is_floating_point():
                averages.append(averaged)
                currents.append(current)
            else:  # a counter
                averaged.copy_(current)
        torch._foreach_lerp_(averages, currents, rate)
        self.n_averaged += 1


def _tensors(network: nn.Module) -> list[torch.Tensor]:
    return [*network.parameters(), *network.buffers()]


def wide(device: torch.device) -> torch.dtype:
    """Returns the type of sums on a device: float64 where it has it."""
    # float64 keeps counts exact past 2^24 and sums independent of their size; Apple GPUs lack it.
    return torch.float32 if device.type == "mps" else torch.float64


def summed(sums: torch.Tensor) -> torch.Tensor:
    """Returns a meter's sums over all ranks, on the host. Synchronises; call it on every rank."""
    return distributed.all_reduce(sums.clone()).cpu()


@dataclass
class TrainingState:
    """Holds where a run stands. `snapshot` saves it and `restore` loads it, bit for bit.

    There is no generator state and no loader state in it: shuffling, augmentation and dropout are
    functions of (seed, epoch, step), see `utils.data.sampler`.
    """

    network: nn.Module  # without any parallel wrapping
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    meter: Any  # sums over the epoch under way: a ClassificationMeter or a LossMeter
    guard: NonFiniteGuard
    rank: int = 0
    epoch: int = 0  # the epoch under way
    step: int = 0  # optimizer steps done in it
    best: dict[str, Any] = field(default_factory=dict)  # the history row with the highest score
    history: list[dict[str, float]] = field(default_factory=list)  # one row per finished epoch
    broken: list[int] = field(default_factory=list)  # images that this rank had to replace
    average: WeightAverage | None = None  # of the network's weights, where there is one

    @property
    def evaluated(self) -> nn.Module:
        """Returns the network that is evaluated, and that a checkpoint's user gets."""
        return self.network if self.average is None else self.average.module

    def finish_step(self, broken: Sequence[int]) -> None:
        """Counts a step that the optimizer has done; `broken` are images replaced in it."""
        self.step += 1
        self.broken += broken
        if self.average is not None:
            self.average.update_parameters(self.network)

    def begin(self, epoch: int) -> None:
        """Moves to the first step of `epoch`: an empty meter, no rows and no best from it on."""
        self.epoch, self.step = epoch, 0
        self.history = [row for row in self.history if row["epoch"] < epoch]
        if self.best and self.best["epoch"] >= epoch:
            self.best = {}
        self.meter.sums.zero_()

    def share_buffers(self) -> None:
        """Gives every rank the BatchNorm statistics of rank 0. Call on every rank."""
        distributed.broadcast_buffers(self.network)
        if self.average is not None:
            distributed.broadcast_buffers(self.average.module)

    @property
    def trained(self) -> list[torch.Tensor]:
        """Returns the parameters that train."""
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def set_lr(self, lr: float) -> None:
        """Sets the learning rate of the next step; a group may have a factor of its own."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)

    def row(self, lr: float, evaluated: Mapping[str, float]) -> dict[str, float]:
        """Returns the history's row of the epoch. Call on every rank.

        Args:
            lr: of the epoch.
            evaluated: the columns of its evaluation.
        """
        trained = {f"train_{name}": value for name, value in self.meter.means().items()}
        return {"epoch": self.epoch, "lr": lr, **trained, **evaluated}

    def finish_epoch(
        self, row: dict[str, float], improved: bool, details: Mapping[str, Any] = EMPTY
    ) -> None:
        """Writes the epoch's row into the history and moves on.

        Args:
            improved: the row is the best so far.
            details: what the best epoch records besides its row.
        """
        self.history.append(row)
        if improved:
            self.best = {**row, **details}
        self.begin(self.epoch + 1)

    def snapshot(self) -> dict:
        """Returns plain values and tensors. Call on every rank: each one's sums are in it.

        Raises:
            UserError: exit code 3, when a loss or a tensor of the network is not finite; such a
                state is never written.
        """
        self.guard.check()
        self._refuse_ruined()
        # One row a rank, not their total: floating-point sums resumed from a total would end in
        # other bits than sums that were never interrupted.
        sums = torch.tensor(distributed.gather(self.meter.sums.tolist()), dtype=torch.float64)
        raw = {}
        if self.average is not None:
            averaged = int(self.average.n_averaged)
            raw = {"raw_state_dict": self.network.state_dict(), "averaged_steps": averaged}
        return {
            "state_dict": self.evaluated.state_dict(),
            **raw,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "progress": {
                "epoch": self.epoch,
                "step": self.step,
                "sums": sums,
                "best": dict(self.best),
                "broken": self.all_broken(),
            },
            "history": [dict(row) for row in self.history],
        }

    def _refuse_ruined(self) -> None:
        """Refuses, on every rank, a network that an update has made not finite.

        The loss before such an update was finite, so the guard has not seen it yet.
        """
        networks = {id(n): n for n in (self.network, self.evaluated)}.values()
        tensors = [t for n in networks for t in n.state_dict().values() if t.is_floating_point()]
        largest = torch.stack([torch.linalg.vector_norm(t, math.inf).float() for t in tensors])
        if distributed.all_reduce((~largest.isfinite()).any().float()) > 0:
            raise UserError(
                f"after step {self.step} of epoch {self.epoch + 1} the network's weights or "
                "BatchNorm statistics are not finite numbers; they were not saved, and earlier "
                f"checkpoints are as they were. Lower --lr, lengthen {self.guard.warmup_flag}, or "
                "use --amp off",
                EXIT_NON_FINITE,
            )

    def all_broken(self) -> list[int]:
        """Returns the replaced images of all ranks, once for each time. Call on every rank."""
        return sorted(index for broken in distributed.gather(self.broken) for index in broken)

    def restore(self, saved: SavedRun) -> None:
        """Loads what `snapshot` returned; the caller has loaded `state_dict` into the network.

        The optimizer's settings (momentum, weight decay, …) stay as this run's flags made them, and
        its learning rate is that of the last step done.
        An average that the saved run did not keep begins here, at its weights.
        """
        if saved.raw_state_dict:
            self.network.load_state_dict(saved.raw_state_dict)
        if self.average is not None:
            self.average.module.load_state_dict(saved.state_dict)
            self.average.n_averaged.fill_(saved.averaged_steps)
        own = self.optimizer.state_dict()["param_groups"]
        for group, before in zip(own, saved.optimizer.param_groups, strict=False):
            group["lr"] = before.lr  # a step sets it, and there may be none to come
            if before.step is not None:  # LAMB counts its steps in the group
                group["step"] = before.step
        state = {"state": saved.optimizer.state, "param_groups": own}
        load_optimizer_state(self.optimizer, state)
        if self.scaler.is_enabled() and saved.scaler:
            self.scaler.load_state_dict(saved.scaler)
        progress = saved.progress
        self.epoch, self.step = progress.epoch, progress.step
        sums = progress.sums  # an earlier version's may lack those of a later figure
        if len(sums) == distributed.ranks():
            self.meter.sums[: sums.shape[1]] = sums[self.rank]
        elif self.rank == 0:  # another number of ranks: one takes all, the others begin at zero
            self.meter.sums[: sums.shape[1]] = sums.sum(dim=0)
        self.best = dict(progress.best)
        self.broken = list(progress.broken) if self.rank == 0 else []
        self.history = [dict(row) for row in saved.history]
