"""Makes optimizers, and chooses the parameters that weight decay is for."""

from typing import Any

import torch
from torch import nn

DECAYED_AXES = (2, 4)  # of linear layers and 2-d convolutions


def make_optimizer(
    kind: str,
    network: nn.Module,
    lr: float,
    momentum: float,
    weight_decay: float,
    norm_decay: bool = True,
) -> torch.optim.Optimizer:
    """Returns an optimizer for a network that is already on its device.

    Args:
        kind: "sgd"; "adamw" of torch; or "lamb" of timm, which limits the gradient's norm to 1.
            The last two have their own default betas and eps.
        momentum: of SGD alone.
        norm_decay: decay every parameter, as the paper does; False spares what `split` says.
    """
    if kind == "sgd":
        return make_sgd(network, lr, momentum, weight_decay, norm_decay)
    groups = _groups(network, norm_decay)
    if kind == "adamw":
        return torch.optim.AdamW(groups, lr=lr, weight_decay=weight_decay, fused=_fused(network))
    assert kind == "lamb", kind
    from timm.optim.lamb import Lamb  # optional; the options have asked for it

    return Lamb(groups, lr=lr, weight_decay=weight_decay)


def make_sgd(
    network: nn.Module, lr: float, momentum: float, weight_decay: float, norm_decay: bool = True
) -> torch.optim.SGD:
    """Returns SGD for a network that is already on its device.

    Args:
        norm_decay: decay every parameter, as the paper does; False spares what `split` says.
    """
    groups, fused = _groups(network, norm_decay), _fused(network)
    optimizer = torch.optim.SGD(
        groups, lr=lr, momentum=momentum, weight_decay=weight_decay, fused=fused
    )
    start_momentum(optimizer)
    return optimizer


def _groups(network: nn.Module, norm_decay: bool) -> list[dict[str, Any]]:
    if norm_decay:
        return [{"params": list(network.parameters())}]
    decayed, spared = split(network)
    return [{"params": decayed}, {"params": spared, "weight_decay": 0.0}]


def _fused(network: nn.Module) -> bool | None:
    """Returns True where there is a fused kernel, by which the guard skips steps on CUDA."""
    return next(network.parameters()).device.type in ("cpu", "cuda") or None


def start_momentum(optimizer: torch.optim.Optimizer) -> None:
    """Gives every parameter that has none a momentum, of 0, before the first step of SGD.

    Without it PyTorch's fused kernel (2.14 and before) leaves memory as it finds it for momentum
    where a gradient scaler skips the first step, as it does with its first scale, and the network
    turns to NaN or is spoilt unseen. A first step from 0 is the same as one without.
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


def split(network: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Returns the parameters to decay, and those to spare: norms, biases and ECA kernels, by their
    axes.

    Weights of linear layers have two axes and those of 2-d convolutions four. Norms and biases have
    one, and ECA's 1-d convolutions three: each of its few numbers serves all channels of a layer.
    """
    decayed: list[nn.Parameter] = []
    spared: list[nn.Parameter] = []
    for parameter in network.parameters():
        (decayed if parameter.ndim in DECAYED_AXES else spared).append(parameter)
    return decayed, spared
