"""Makes optimizers, and holds what every one of their steps does alike."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from utils.config.flags import BaseRecipe
from utils.data.sampler import mix_seed
from utils.system import backends
from utils.system.backends import AutocastFactory
from utils.system.distributed import Context

DECAYED_AXES = (2, 4)  # of linear layers and 2-d convolutions


@dataclass(frozen=True)
class StepRule:
    """Holds what every optimizer step of a run does alike.

    Args:
        recipe: gives the learning rate and the gradient's largest norm.
        steps_per_epoch: to turn steps into epochs.
        seed: with the step's number it seeds everything random in it (mixing, dropout, sampled
            anchors), so that a resumed run needs no generator state.
        autocast: makes the context in which forward and loss run.
    """

    recipe: Any  # of either kind
    steps_per_epoch: int
    seed: int
    autocast: AutocastFactory

    @classmethod
    def of(
        cls, recipe: BaseRecipe, steps_per_epoch: int, seed: int, amp: str, context: Context
    ) -> "StepRule":
        """Returns the rule of a run; of its `seed`, ranks draw by seeds of their own."""
        autocast = partial(backends.autocast, context.device, amp)
        return cls(recipe, steps_per_epoch, mix_seed(seed, context.rank), autocast)

    def lr_at(self, step: int) -> float:
        """Returns the learning rate of the run's step of this number."""
        return float(self.recipe.lr_at(step, self.steps_per_epoch))


def make_optimizer(
    kind: str,
    network: nn.Module,
    lr: float,
    momentum: float,
    weight_decay: float,
    norm_decay: bool = True,
    lr_scales: Mapping[str, float] | None = None,
) -> torch.optim.Optimizer:
    """Returns an optimizer for a network that is already on its device.

    Args:
        kind: "sgd"; "adamw" of torch; or "lamb" of timm, which limits the gradient's norm to 1.
            The last two have their own default betas and eps.
        momentum: of SGD alone.
        norm_decay: decay every parameter, as the paper does. False spares norms, biases and ECA
            kernels, by their axes: weights of linear layers have two and those of 2-d convolutions
            four; norms and biases have one, and ECA's 1-d convolutions three.
        lr_scales: factors by the parameters' names, which stand in the groups as "lr_scale": who
            sets a group's rate multiplies it. None for 1.
    """
    groups: dict[tuple[float | None, bool], dict[str, Any]] = {}
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            scale = None if lr_scales is None else lr_scales[name]
            spared = not norm_decay and parameter.ndim not in DECAYED_AXES
            own = {} if scale is None else {"lr_scale": scale}
            own |= {"weight_decay": 0.0} if spared else {}
            groups.setdefault((scale, spared), {"params": [], **own})["params"].append(parameter)
    # Where there is a fused kernel, the guard skips steps on CUDA by it.
    fused = next(network.parameters()).device.type in ("cpu", "cuda") or None
    usual: dict[str, Any] = {"lr": lr, "weight_decay": weight_decay}
    if kind == "adamw":
        return torch.optim.AdamW([*groups.values()], **usual, fused=fused)
    if kind == "lamb":
        from timm.optim.lamb import Lamb  # optional; the command line has looked for it

        return Lamb([*groups.values()], **usual)
    assert kind == "sgd", kind
    sgd = torch.optim.SGD([*groups.values()], **usual, momentum=momentum, fused=fused)
    start_momentum(sgd)
    return sgd


def start_momentum(optimizer: torch.optim.Optimizer) -> None:
    """Gives every parameter that has none a momentum, of 0, before the first step of SGD.

    Without it PyTorch's fused kernel (2.14 and before) leaves memory as it is for momentum where a
    gradient scaler skips the first step, as it does with its first scale, and the network turns to
    NaN or is spoilt unseen. A first step from 0 is the same as one without.
    """
    for group in optimizer.param_groups:
        if group.get("momentum"):
            for parameter in group["params"]:
                if optimizer.state[parameter].get("momentum_buffer") is None:
                    optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)


def load_optimizer_state(optimizer: torch.optim.Optimizer, saved: dict) -> None:
    """Loads saved optimizer state so that PyTorch's fused kernels can continue from it.

    They walk parameter, gradient and state alike by places in memory, whatever the strides say. But
    saved state has the memory format of the run that saved it, which may be another one.
    """
    optimizer.load_state_dict(saved)
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
                fitting = torch.empty_like(parameter, dtype=value.dtype)
                state[name] = fitting.copy_(value)
    start_momentum(optimizer)
