"""Makes optimizers, and chooses the parameters that weight decay is for."""

from collections.abc import Mapping
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
    lr_scales: Mapping[str, float] | None = None,
) -> torch.optim.Optimizer:
    """Returns an optimizer for a network that is already on its device.

    Args:
        kind: "sgd"; "adamw" of torch; or "lamb" of timm, which limits the gradient's norm to 1.
            The last two have their own default betas and eps.
        momentum: of SGD alone.
        norm_decay: decay every parameter, as the paper does; False spares what `split` says.
        lr_scales: factors by the parameters' names, which stand in the groups as "lr_scale": who
            sets a group's rate multiplies it. None for 1.
    """
    if kind == "sgd":
        return make_sgd(network, lr, momentum, weight_decay, norm_decay, lr_scales)
    groups = _groups(network, norm_decay, lr_scales)
    if kind == "adamw":
        return torch.optim.AdamW(groups, lr=lr, weight_decay=weight_decay, fused=_fused(network))
    assert kind == "lamb", kind
    from timm.optim.lamb import Lamb  # optional; the options have asked for it

    return Lamb(groups, lr=lr, weight_decay=weight_decay)


def make_sgd(
    network: nn.Module,
    lr: float,
    momentum: float,
    weight_decay: float,
    norm_decay: bool = True,
    lr_scales: Mapping[str, float] | None = None,
) -> torch.optim.SGD:
    """Returns SGD for a network that is already on its device.

    Args:
        norm_decay, lr_scales: as in `make_optimizer`.
    """
    groups, fused = _groups(network, norm_decay, lr_scales), _fused(network)
    optimizer = torch.optim.SGD(
        groups, lr=lr, momentum=momentum, weight_decay=weight_decay, fused=fused
    )
    start_momentum(optimizer)
    return optimizer


def _groups(
    network: nn.Module, norm_decay: bool, lr_scales: Mapping[str, float] | None
) -> list[dict[str, Any]]:
    """Returns groups of the parameters that train: by decay, and by factors of the rate."""
    if lr_scales is not None:
        return _scaled_groups(network, norm_decay, lr_scales)
    if norm_decay:
        return [{"params": [p for p in network.parameters() if p.requires_grad]}]
    decayed, spared = split(network)
    return [{"params": decayed}, {"params": spared, "weight_decay": 0.0}]


def _scaled_groups(
    network: nn.Module, norm_decay: bool, lr_scales: Mapping[str, float]
) -> list[dict[str, Any]]:
    groups: dict[tuple[float, bool], dict[str, Any]] = {}
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            scale, spared = lr_scales[name], not norm_decay and not is_decayed(parameter)
            group = groups.setdefault((scale, spared), {"params": [], "lr_scale": scale})
            group["params"].append(parameter)
            if spared:
                group["weight_decay"] = 0.0
    return list(groups.values())


def is_decayed(parameter: nn.Parameter) -> bool:
    """Returns whether a parameter is no norm's, bias or ECA kernel, by its axes; see `split`."""
    return parameter.ndim in DECAYED_AXES


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
    """Returns the parameters that train: those to decay, and those to spare, which are norms,
    biases and ECA kernels, by their axes.

    Weights of linear layers have two axes and those of 2-d convolutions four. Norms and biases have
    one, and ECA's 1-d convolutions three: each of its few numbers serves all channels of a layer.
    """
    decayed: list[nn.Parameter] = []
    spared: list[nn.Parameter] = []
    for parameter in network.parameters():
        if parameter.requires_grad:
            (decayed if is_decayed(parameter) else spared).append(parameter)
    return decayed, spared
