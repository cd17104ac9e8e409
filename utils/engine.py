"""One epoch of training and one evaluation, for any classifier and any optimizer.

Nothing here knows the command line, files or the terminal. `train_epoch` is a generator that rests
after every optimizer step, so that its caller can print, save or stop between steps, where the
state is whole.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager

import torch
from torch import nn

from utils import distributed
from utils.data import Batch
from utils.errors import EXIT_NON_FINITE, UserError
from utils.metrics import ClassificationMeter, cross_entropy
from utils.sampler import mix_seed

AutocastFactory = Callable[[], AbstractContextManager]
Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class NonFiniteGuard:
    """Keeps a loss that is not a finite number from reaching the weights.

    On the CPU the step stops at once. On a GPU, asking would wait for the device at every step:
    there the flag is handed to the fused optimizer, which skips its update on the device, and
    `check` raises at the next moment that synchronises anyway, before anything is saved.
    """

    def __init__(self, device: torch.device):
        self.first_bad = torch.full((), -1, dtype=torch.int64, device=device)
        self.wait = device.type != "cuda"

    def before_update(
        self, value: torch.Tensor, step: int, optimizer: torch.optim.Optimizer, what: str
    ) -> None:
        """Call between backward and `optimizer.step()` with the loss (or gradient norm)."""
        bad = distributed.all_reduce((~value.detach().isfinite()).float())
        fresh = (bad > 0) & (self.first_bad < 0)
        self.first_bad = torch.where(fresh, step, self.first_bad)
        if self.wait:
            self.check(what)
        else:
            optimizer.found_inf = bad.clamp_(max=1)

    def check(self, what: str = "loss") -> None:
        """Raises when a value was not finite. Synchronises with the device.

        Raises:
            UserError: names the step, with exit code 3.
        """
        step = int(self.first_bad)
        if step >= 0:
            raise UserError(
                f"the {what} of step {step + 1} is not a finite number; the weights were left as "
                "they were before it. Lower --lr, lengthen --warmup-epochs, or use --amp off",
                EXIT_NON_FINITE,
            )


def train_epoch(
    network: nn.Module,
    batches: Iterable[Batch],
    optimizer: torch.optim.Optimizer,
    meter: ClassificationMeter,
    guard: NonFiniteGuard,
    *,
    first_step: int,
    lr_at: Callable[[int], float],
    seed: int,
    autocast: AutocastFactory,
    scaler: torch.amp.GradScaler,
    loss_fn: Loss = cross_entropy,
) -> Iterator[Batch]:
    """Trains on `batches`, yielding each batch after its step.

    Args:
        network: in any parallel wrapping; images (N, 3, S, S) → logits (N, C).
        optimizer: SGD with `fused=True` on CUDA (the guard needs it).
        first_step: the run's step number of the first batch.
        lr_at: step → learning rate.
        seed: with the step number it seeds everything random in the network (dropout), so that a
            resumed run needs no generator state.
        autocast: makes the context in which forward and loss run.
        scaler: gradient scaler, disabled unless fp16 is used.

    Raises:
        UserError: exit code 3, when the loss is not finite (see NonFiniteGuard).
    """
    network.train()
    for step, batch in enumerate(batches, first_step):
        torch.manual_seed(mix_seed(seed, step))
        for group in optimizer.param_groups:
            group["lr"] = lr_at(step)
        with autocast():
            logits = network(batch.images)
            loss = loss_fn(logits, batch.targets)
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()
        guard.before_update(loss, step, optimizer, "loss")
        scaler.step(optimizer)
        scaler.update()
        meter.update(loss, logits, batch.targets)
        yield batch


@torch.inference_mode()
def evaluate(
    network: nn.Module,
    batches: Iterable[Batch],
    device: torch.device,
    autocast: AutocastFactory,
    stop: Callable[[], bool] = lambda: False,
) -> dict[str, float] | None:
    """Mean loss and top-1/top-5 (in %) of `network` over all ranks' `batches`.

    Returns:
        {"loss", "top1", "top5", "images"}, or None when `stop()` said so before the end.
    """
    network.eval()
    meter = ClassificationMeter(device)
    for batch in batches:
        if stop():
            return None
        with autocast():
            logits = network(batch.images)
        meter.update(cross_entropy(logits, batch.targets), logits, batch.targets)
    total = meter.total()
    return {**meter.means(total), "images": int(total[3])}
