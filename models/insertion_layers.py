"""The modules that `add_eca` puts into a network: an ECA layer that can start as nothing, its seat.

They are modules like others, without hooks on the way forward, so that torch.fx, TorchScript,
deepcopy and what replaces normalisations keep them.
"""

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn

from .eca_module import ECALayer

INNER = "without_eca"


class InsertedECA(ECALayer):
    """An ECA layer for `channels` channels whose gate can start at 1.

    Args:
        identity: gate 2 · σ(conv1d(y)) with a zero kernel, instead of σ(conv1d(y)) with a fresh
            one. The factor is a buffer, `gain`, so that such weights do not load into a layer
            without it, which would halve its output.

    Shape: (N, channels, H, W) → the same. Anything else is a ValueError: in a layout with the
    channels last, the gates would silently be those of the rows. A graph of torch.fx keeps the
    question as a node, and raises an AssertionError.
    """

    def __init__(self, channels: int, kernel_size: int, identity: bool = True):
        super().__init__(kernel_size)
        self.channels = channels
        self.register_buffer("gain", torch.tensor(2.0) if identity else None)
        if identity:
            nn.init.zeros_(self.conv.weight)

    def forward(self, x: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            if x.dim() != 4 or x.shape[1] != self.channels:
                raise ValueError("ECA was put where another shape than (N, C, H, W) comes")
        else:
            self._check(x)
        gate = torch.sigmoid(self.conv(x.mean((2, 3)).unsqueeze(1)))
        if self.gain is not None:
            gate = self.gain * gate  # type: ignore[operator]
        return x * gate.transpose(1, 2).unsqueeze(-1)

    @torch.jit.unused
    def _check(self, x: Tensor) -> None:
        expected = f"ECA was put where shape (N, {self.channels}, H, W) was expected and"
        remedy = "put it after a module whose output has that shape"
        if isinstance(x, torch.fx.Proxy):
            torch._assert(x.dim() == 4, f"{expected} another number of axes came: {remedy}")
            torch._assert(x.size(1) == self.channels, f"{expected} other channels came: {remedy}")
        elif x.dim() != 4 or x.shape[1] != self.channels:
            raise ValueError(f"{expected} {tuple(x.shape)} came: {remedy}")


class WithECA(nn.Sequential):
    """A module with an ECA layer right behind it, in the place of the module alone.

    The state dict has the module's keys as they were, and ECA's below `eca.`; attributes of the
    module are read and set through it. In `named_modules` and `named_parameters` the module's own
    name is `without_eca`.

    Args:
        module: takes one tensor.
        eca: takes the module's output.
    """

    def __init__(self, module: nn.Module, eca: nn.Module):
        super().__init__(OrderedDict({INNER: module, "eca": eca}))
        self.train(module.training)
        module_: Any = self  # torch gives these three no types
        module_.register_state_dict_post_hook(_write_plain_keys)
        module_.register_load_state_dict_pre_hook(_read_plain_keys)
        module_.register_load_state_dict_post_hook(_name_plain_keys)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            inner = self.__dict__.get("_modules", {}).get(INNER)
            if inner is None or name.startswith("_"):
                raise
            return getattr(inner, name)

    def __setattr__(self, name: str, value: Any) -> None:
        inner = self.__dict__.get("_modules", {}).get(INNER)
        own = name.startswith("_") or name in self.__dict__ or hasattr(type(self), name)
        if inner is None or own or name in self._modules or not hasattr(inner, name):
            super().__setattr__(name, value)
        else:
            setattr(inner, name, value)


def _write_plain_keys(
    module: nn.Module, state_dict: dict[str, Any], prefix: str, _: dict[str, Any]
) -> None:
    """Takes `without_eca` out of the module's keys, and keeps their order."""
    inner = f"{prefix}{INNER}."
    for key in [key for key in state_dict if key.startswith(prefix)]:
        value = state_dict.pop(key)
        state_dict[prefix + key[len(inner) :] if key.startswith(inner) else key] = value
    metadata = getattr(state_dict, "_metadata", {})
    for key in [key for key in metadata if f"{key}.".startswith(inner)]:
        metadata[f"{prefix}{f'{key}.'[len(inner) :]}"[:-1]] = metadata.pop(key)


def _read_plain_keys(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Puts `without_eca` into the keys that are not ECA's."""
    for key in [key for key in state_dict if key.startswith(prefix)]:
        if not key.startswith((f"{prefix}eca.", f"{prefix}{INNER}.")):
            state_dict[f"{prefix}{INNER}.{key[len(prefix) :]}"] = state_dict.pop(key)


def _name_plain_keys(module: nn.Module, incompatible: Any) -> None:
    """Names missing and unexpected keys as a state dict has them."""
    for keys in incompatible:
        keys[:] = [key.replace(f".{INNER}.", ".") for key in keys]
