"""Holds all that training changes, as one object that is saved and restored bit for bit."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn

from utils.system import distributed
from utils.system.errors import EXIT_NON_FINITE, UserError
from utils.training.finite_guard import NonFiniteGuard
from utils.training.optimizer import load_optimizer_state
from utils.training.outcome import Outcome
from utils.training.weight_average import WeightAverage


class Meter(Protocol):
    """Sums over the epoch under way, on the device: this rank's share."""

    sums: torch.Tensor

    def total(self) -> torch.Tensor:
        """Returns the sums over all ranks, on the host."""

    def means(self, total: torch.Tensor) -> dict[str, float]:
        """Returns the mean figures of `total`."""


@dataclass
class RunState:
    """Holds where a run stands. `snapshot` saves it and `restore` loads it, bit for bit.

    There is no generator state and no loader state in it: shuffling, augmentation and dropout are
    functions of (seed, epoch, step), see `utils.data.sampler`.
    """

    network: nn.Module  # without any parallel wrapping
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    meter: Meter  # of the epoch under way
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

    def finish_epoch(self, lr: float, found: Any, outcome: Outcome) -> bool:
        """Writes the epoch into the history and moves on. Call on every rank.

        Args:
            lr: of the epoch.
            found: what the evaluation returned.
            outcome: which columns and which score it has.

        Returns:
            Whether its score is the best so far.
        """
        means = self.meter.means(self.meter.total())
        row = {"epoch": self.epoch, "lr": lr}
        row |= {f"train_{name}": value for name, value in means.items()}
        row |= outcome.validated(found)
        self.history.append(row)
        score, before = outcome.score(row), outcome.score(self.best) if self.best else None
        improved = score is not None and (before is None or score > before)
        if improved:
            self.best = {**row, **outcome.best_details(found)}
        self.begin(self.epoch + 1)
        return improved

    def epochs_since_best(self, outcome: Outcome) -> int:
        """Returns how many epochs have ended since the first one with the highest score; all of
        them where none has a score.
        """
        scores = [outcome.score(row) for row in self.history]
        known = [score for score in scores if score is not None]
        return len(scores) - 1 - scores.index(max(known)) if known else len(scores)

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

    def restore(self, saved: dict) -> None:
        """Loads what `snapshot` returned; the caller has loaded `state_dict` into the network.

        The optimizer's settings (momentum, weight decay, …) stay as this run's flags made them, and
        its learning rate is that of the last step done.
        An average that the saved run did not keep begins here, at its weights.
        """
        if "raw_state_dict" in saved:
            self.network.load_state_dict(saved["raw_state_dict"])
        if self.average is not None:
            self.average.module.load_state_dict(saved["state_dict"])
            self.average.n_averaged.fill_(saved.get("averaged_steps", 0))
        own = self.optimizer.state_dict()["param_groups"]
        for group, before in zip(own, saved["optimizer"]["param_groups"], strict=False):
            group["lr"] = before["lr"]  # a step sets it, and there may be none to come
            if "step" in before:  # LAMB counts its steps in the group
                group["step"] = before["step"]
        load_optimizer_state(self.optimizer, {**saved["optimizer"], "param_groups": own})
        if self.scaler.is_enabled() and saved["scaler"]:
            self.scaler.load_state_dict(saved["scaler"])
        progress = saved["progress"]
        self.epoch, self.step = progress["epoch"], progress["step"]
        if len(progress["sums"]) == distributed.ranks():
            self.meter.sums.copy_(progress["sums"][self.rank])
        elif self.rank == 0:  # another number of ranks: one takes all, the others begin at zero
            self.meter.sums.copy_(progress["sums"].sum(dim=0))
        self.best = dict(progress["best"])
        self.broken = list(progress["broken"]) if self.rank == 0 else []
        self.history = [dict(row) for row in saved["history"]]
