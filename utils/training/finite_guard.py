"""Stops training before a loss or a gradient that is not finite reaches the weights."""

import torch

from utils.system import distributed
from utils.system.errors import EXIT_NON_FINITE, UserError


class NonFiniteGuard:
    """Stops a loss that is not a finite number before it reaches the weights.

    On the CPU the step stops at once. On a GPU, asking would wait for the device at every step:
    there the flag is handed to a fused optimizer, which skips its update on the device, and
    `check` raises at the next moment that synchronises anyway, before anything is saved. An
    optimizer without such a kernel (LAMB) has to wait.

    Args:
        warmup_flag: what the remedy calls the length of the warm-up.
    """

    def __init__(self, device: torch.device, warmup_flag: str = "--warmup-epochs"):
        self.warmup_flag = warmup_flag
        self.first_bad = torch.full((), -1, dtype=torch.int64, device=device)
        self.wait = device.type != "cuda"
        self.what = "loss"

    def before_update(
        self, value: torch.Tensor, step: int, optimizer: torch.optim.Optimizer, what: str
    ) -> None:
        """Checks the loss (or gradient norm); to be called between backward and `optimizer.step()`.

        Args:
            what: names the value, the same at each step.
        """
        self.what = what
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
