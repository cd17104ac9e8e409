"""Puts attention into networks that were built without it: torchvision's, timm's, or one's own.

    network = torchvision.models.resnet50(weights="DEFAULT")
    add_eca(network)  # computes what it did before, and can now be fine-tuned

A fresh ECA layer scales every channel by about σ(0) = 0.5, which wrecks pretrained weights. The
layers put in here have the gate 2 · σ(conv1d(y)) and a kernel of zeros: a gate of exactly 1, that
learns from there. (Weight decay then pulls towards 1, the network without ECA.)

What is put in are modules like others, without hooks on the way forward, so that torch.fx,
TorchScript, deepcopy and what replaces normalisations keep them.
"""

import fnmatch
import inspect
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple, TypeGuard, cast

import torch
from torch import Tensor, nn

from .attention import Attention, Kind, find_attention
from .eca_module import ADAPTIVE, ECALayer, adaptive_kernel_size

INNER = "without_eca"
IsThere = Callable[[nn.Module], bool]  # whether a module is a layer of the attention


class InsertedECA(ECALayer):
    """An ECA layer for `channels` channels whose gate can start at 1.

    Args:
        identity: gate 2 · σ(conv1d(y)) with a zero kernel, instead of σ(conv1d(y)) with a fresh
            one. The factor is a buffer, `gain`, so that such weights do not load into a layer
            without it, which would halve its output.
        axes: spatial axes of the input: 2 for images, 3 for videos.

    Shape: (N, channels, H, W), or with `axes` 3 (N, channels, T, H, W) → the same. Anything else
    is a ValueError: in a layout with the channels last, the gates would silently be those of the
    rows. A graph of torch.fx keeps the question as a node, and raises an AssertionError.
    """

    def __init__(self, channels: int, kernel_size: int, identity: bool = True, axes: int = 2):
        super().__init__(kernel_size)
        self.channels = channels
        self.axes = axes
        self.pooled_axes = tuple(range(2, 2 + axes))
        self.register_buffer("gain", torch.tensor(2.0) if identity else None)
        if identity:
            nn.init.zeros_(self.conv.weight)

    def forward(self, x: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            if x.dim() != 2 + self.axes or x.shape[1] != self.channels:
                raise ValueError("ECA was put where another shape than (N, C, H, W) comes")
        else:
            self._check(x)
        gate = torch.sigmoid(self.conv(x.mean(self.pooled_axes).unsqueeze(1)))
        if self.gain is not None:
            gate = self.gain * gate  # type: ignore[operator]
        gate = gate.transpose(1, 2)
        for _ in range(self.axes - 1):
            gate = gate.unsqueeze(-1)
        return x * gate

    @torch.jit.unused
    def _check(self, x: Tensor) -> None:
        pixels = {1: "L", 2: "H, W", 3: "T, H, W"}[self.axes]
        expected = f"ECA was put where shape (N, {self.channels}, {pixels}) was expected and"
        remedy = "put it after a module whose output has that shape"
        if isinstance(x, torch.fx.Proxy):
            torch._assert(
                x.dim() == 2 + self.axes, f"{expected} another number of axes came: {remedy}"
            )
            torch._assert(x.size(1) == self.channels, f"{expected} other channels came: {remedy}")
        elif x.dim() != 2 + self.axes or x.shape[1] != self.channels:
            raise ValueError(f"{expected} {tuple(x.shape)} came: {remedy}")


class WithECA(nn.Sequential):
    """A module with an attention layer right behind it, in the place of the module alone.

    The state dict has the module's keys as they were, and the layer's below `eca.`, or its other
    name; attributes of the module are read and set through it. In `named_modules` and
    `named_parameters` the module's own name is `without_eca`.

    Args:
        module: takes one tensor.
        layer: takes the module's output.
        name: of the layer.
    """

    def __init__(self, module: nn.Module, layer: nn.Module, name: str = "eca"):
        super().__init__(OrderedDict({INNER: module, name: layer}))
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
    """Puts `without_eca` into the keys that are not the attention layer's."""
    for key in [key for key in state_dict if key.startswith(prefix)]:
        if not key.startswith(tuple(f"{prefix}{name}." for name in module._modules)):
            state_dict[f"{prefix}{INNER}.{key[len(prefix) :]}"] = state_dict.pop(key)


def _name_plain_keys(module: nn.Module, incompatible: Any) -> None:
    """Names missing and unexpected keys as a state dict has them."""
    for keys in incompatible:
        keys[:] = [key.replace(f".{INNER}.", ".") for key in keys]


# Class names, as neither library need be there: torchvision's and timm's residual blocks, ...
BLOCKS = frozenset(
    {
        "BasicBlock",
        "Bottleneck",  # ResNet, ResNeXt; timm's RegNet
        "ResBottleneckBlock",  # torchvision's RegNet
        "BottleneckBlock",  # timm's networks of configured blocks, such as GENet
        "InvertedResidual",
        "_InvertedResidual",  # torchvision's MNASNet
        "UniversalInvertedResidual",
        "DepthwiseSeparableConv",  # MobileNets
        "MBConv",
        "FusedMBConv",
        "EdgeResidual",  # EfficientNet
        "CNBlock",
        "ConvNeXtBlock",
    }
)
# ... those that are residual only if their `has_skip` says so, ...
MAYBE_BLOCKS = frozenset({"ConvBnAct"})  # timm's EfficientNetV2, whose other ones are plain layers
# ... squeeze-and-excitation, ECA of whatever make, and the branch that the last addition adds to.
SQUEEZES = frozenset({"SqueezeExcitation", "SqueezeExcite", "SEModule", "SELayer"})
ECAS = frozenset({"ECALayer", "InsertedECA", "EcaModule", "CecaModule", "eca_layer"})
SHORTCUTS = frozenset({"downsample", "shortcut", "skip", "proj", "identity"})

# Layers that tell how many spatial axes there are.
AXES: dict[int, tuple[type[nn.Module], ...]] = {
    1: (nn.BatchNorm1d, nn.InstanceNorm1d, nn.Conv1d),
    2: (nn.BatchNorm2d, nn.InstanceNorm2d, nn.Conv2d),
    3: (nn.BatchNorm3d, nn.InstanceNorm3d, nn.Conv3d),
}

_REMEDY = "give the type of the blocks, or the places by name, such as after='layer*.*.bn3'"


class Insertion(NamedTuple):
    """One attention layer that `add_attention` put in."""

    name: str  # of the layer in the network, the beginning of its keys
    place: str  # "after layer1.0.bn3"
    channels: int
    kernel_size: int | None  # None for an attention without one
    attention: str = "eca"

    def __str__(self) -> str:
        k = f" k={self.kernel_size}" if self.kernel_size else ""
        return f"{_title(self.attention)}{k} on {self.channels} channels {self.place}"


def _title(attention: str) -> str:
    return "ECA" if attention == "eca" else attention


After = str | Sequence[str] | type[nn.Module] | tuple[type[nn.Module], ...] | None
InsertedKsize = Literal["adaptive"] | int | Sequence[int]


def add_eca(
    model: nn.Module,
    after: After = None,
    ksize: InsertedKsize = ADAPTIVE,
    identity: bool = True,
    replace_se: bool = False,
    quiet: bool = False,
) -> list[Insertion]:
    """Puts an ECA layer at the end of every residual branch of `model`, in place.

    That is after the block's last normalisation and before the addition, as in ECA-ResNet. The
    names and values of what was there stay, squeeze-and-excitation included, and the network's
    output does too, unless `replace_se` is on or `identity` off. Blocks that have ECA are passed
    over, so a second call changes nothing. For the arguments see `add_attention`.
    """
    return add_attention(model, "eca", after, ksize, identity, replace_se, quiet)


def add_attention(
    model: nn.Module,
    attention: Kind,
    after: After = None,
    ksize: InsertedKsize = ADAPTIVE,
    identity: bool | None = None,
    replace_se: bool = False,
    quiet: bool = False,
) -> list[Insertion]:
    """Puts a layer of an attention at the end of every residual branch of `model`, in place.

    Another attention than ECA starts as its layer does, so a trained network computes something
    else until it is trained.

    Args:
        model: ResNet, ResNeXt, RegNet, MobileNetV2 and V3, MNASNet, EfficientNet, EfficientNetV2
            and ConvNeXt of torchvision and timm, torchvision's video ResNets (ECA alone) and timm's
            GENet are known; others with `after`.
        attention: as `find_attention` takes it, but for "none".
        after: the type of the residual blocks, or several; or a pattern for the names of the
            modules right after which the layer goes, such as "layer*.*.bn3" (`*` stays between
            dots), or several.
        ksize: "adaptive" (eq. 12, by each layer's channels), an odd integer, or one for each layer.
            Without effect on an attention that has no kernel size.
        identity: start with a gate of exactly 1: for ECA alone, and there True unless told.
        replace_se: put the layer in the place of squeeze-and-excitation, whose trained weights go;
            the network then computes something else until it is trained.
        quiet: do not print what was changed.

    Returns:
        What was put in, in the order of the network's modules.

    Raises:
        ValueError: one line; no place was found, or a block whose end cannot be told. The network
            is then as it was.
    """
    kind = find_attention(attention)
    if kind is None or (identity and kind.name != "eca"):
        name = "none" if kind is None else kind.name
        raise ValueError(f"attention {name}: nothing to put in, or none that starts as identity")
    if ksize != ADAPTIVE and not isinstance(ksize, list | tuple):
        ECALayer(cast(int, ksize))  # raises for a size that will not do
    plan = _plan(model, kind, after, replace_se)
    sizes = list(ksize) if isinstance(ksize, list | tuple) else [ksize] * len(plan)
    if len(sizes) != len(plan):
        raise ValueError(f"ksize has {len(sizes)} kernel sizes for {len(plan)} layers")
    done, layers = [], []
    for (name, instead), k in zip(plan, sizes, strict=True):
        layers.append(_layer(model, name, instead, kind, k, identity is not False))
    for (name, instead), (layer, channels, k) in zip(plan, layers, strict=True):
        place = f"{'in place of' if instead else 'after'} {name}"
        name = _insert(model, name, layer, instead, kind.slot)
        done.append(Insertion(name, place, channels, k, kind.name))
    if not quiet:
        _report(type(model).__name__, done, sum(instead for _, instead in plan))
    return done


def _plan(
    model: nn.Module, kind: Attention, after: After, replace_se: bool
) -> list[tuple[str, bool]]:
    """Returns where layers go: the name of a module, and whether in its stead."""
    is_there: IsThere = _is_eca
    if kind.name != "eca":
        own = type(kind.build(64, 3 if kind.takes_ksize else None))
        is_there = lambda module: type(module) is own  # noqa: E731
    patterns: Any = [after] if isinstance(after, str) else after
    if isinstance(patterns, Sequence) and patterns and all(isinstance(p, str) for p in patterns):
        names = [name for each in patterns for name in _matching(model, each, is_there)]
        places = [(name, False, _is_done(model, name, is_there)) for name in names]
    else:
        types = after if isinstance(after, tuple) else (after,)
        if after is not None and not all(isinstance(each, type) for each in types):
            raise ValueError(f"after={after!r} is neither a name nor a type: {_REMEDY}")
        places = list(_places(model, after, replace_se, is_there))
    if not places:
        raise ValueError(
            f"found no place for {_title(kind.name)} in {type(model).__name__}: {_REMEDY}"
        )
    plan = [(name, instead) for name, instead, is_done in places if not is_done]
    for name, instead in plan:
        if not instead:
            _check_place(model, name)
    return plan


def _layer(
    model: nn.Module, name: str, instead: bool, kind: Attention, ksize: Any, identity: bool
) -> tuple[nn.Module, int, int | None]:
    """Makes the layer for the output of module `name`; returns it, its channels and kernel size."""
    channels, axes = _channels(model, name, instead), _spatial_axes(model, name)
    k = adaptive_kernel_size(channels) if ksize == ADAPTIVE else ksize
    if kind.takes_ksize and k > 2 * channels - 1:  # 3557, say, which is four sizes in our ResNets
        raise ValueError(
            f"ksize {k}: {name} has {channels} channels, so the kernel's ends reach none; give one"
            " odd number for all layers, such as 3"
        )
    if kind.name == "eca":
        return InsertedECA(channels, k, identity, axes), channels, k
    if axes != 2:
        raise ValueError(f"{kind.name} is for images, and {name} has {axes} spatial axes")
    k = k if kind.takes_ksize else None
    return kind.build(channels, k), channels, k


def _report(network: str, done: Sequence[Insertion], replaced: int) -> None:
    """Prints what was put in, and with `!` how many trained attentions went."""
    title = _title(done[0].attention) if done else "ECA"
    weights = sum(insertion.kernel_size or 0 for insertion in done)
    size = f", {weights} parameters" if title == "ECA" else ""
    print(f"{network}: {len(done)} {title} layers put in{size}")
    if replaced:
        what = "squeeze-and-excitation layers were replaced, and their weights are gone"
        print(f"! {replaced} {what}: train the network before use")
    for insertion in done:
        print(f"  {insertion}")


def _matching(model: nn.Module, pattern: str, is_there: IsThere) -> Iterator[str]:
    parts = pattern.split(".")
    for name, _ in model.named_modules():
        words = name.split(".")
        alike = len(words) == len(parts) and all(map(fnmatch.fnmatchcase, words, parts))
        if alike and not is_there(_parent(model, name)[0]):
            yield name


def _places(
    model: nn.Module, types: Any, replace_se: bool, is_there: IsThere
) -> Iterator[tuple[str, bool, bool]]:
    """For each residual block: the place, whether in its stead, and whether a layer is there."""
    for name, block in model.named_modules():
        if not (_is_known(block) if types is None else isinstance(block, types)):
            continue
        if any(map(is_there, block.modules())):
            yield name, False, True
            continue
        place, instead = _end_of_branch(name, block, replace_se)
        yield ".".join(filter(None, (name, place))), instead, False


def _is_known(block: nn.Module) -> bool:
    kind = type(block).__name__
    if kind in MAYBE_BLOCKS:
        return bool(getattr(block, "has_skip", False))
    return kind in BLOCKS and not _concatenates(block)


def _concatenates(block: nn.Module) -> bool:
    """Tells whether the block joins its branches by `cat`: ShuffleNetV2's has a residual's name."""
    forward = inspect.unwrap(type(block).forward)
    return not {"cat", "concat", "concatenate"}.isdisjoint(forward.__code__.co_names)


def _end_of_branch(name: str, block: nn.Module, replace_se: bool) -> tuple[str, bool]:
    """The name within `block` of the module that ECA comes after, or in whose stead."""
    kind = type(block).__name__
    if kind == "CNBlock":  # its normalisation stands before the MLP, with the channels last
        return "block", False
    if kind == "ConvNeXtBlock":  # likewise, and it turns the axes back outside of any module
        return "drop_path", False
    last, weights_after = None, False
    for place, module in _branch(block):
        if type(module).__name__ in SQUEEZES:
            if replace_se:
                return place, True
        elif _is_norm(module):
            last, weights_after = place, False
        elif isinstance(module, nn.modules.conv._ConvNd | nn.Linear):
            weights_after = True
    if last is None or weights_after:
        what = "has no normalisation" if last is None else "does not end with its normalisation"
        raise ValueError(f"{name} ({kind}) {what}, so ECA's place is not clear: {_REMEDY}")
    return last, False


def _branch(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The modules of a block in order, without its shortcut and the insides of attentions."""
    yield prefix, module
    if type(module).__name__ not in SQUEEZES:
        for name, child in module.named_children():
            if prefix or name not in SHORTCUTS:
                yield from _branch(child, f"{prefix}.{name}" if prefix else name)


def _is_norm(module: nn.Module) -> bool:
    has_own = bool(module._parameters) or bool(module._buffers)  # not a block named after one
    return has_own and "norm" in type(module).__name__.lower()


def _is_eca(module: nn.Module) -> bool:
    return isinstance(module, ECALayer) or type(module).__name__ in ECAS


def _is_done(model: nn.Module, name: str, is_there: IsThere) -> bool:
    """Whether a layer is at this place: there itself, in it as a member, or right behind it."""
    place = model.get_submodule(name)
    parent, own = _parent(model, name)
    if is_there(place) or any(map(is_there, place.children())):
        return True
    siblings = dict(parent.named_children())
    behind = list(siblings)[list(siblings).index(own) + 1 :] if own in siblings else []
    return _runs_in_order(parent) and bool(behind) and is_there(siblings[behind[0]])


def _channels(model: nn.Module, name: str, instead: bool) -> int:
    """Channels of the output of module `name`, read off its parameters."""
    block, own = _parent(model, name)
    if _ends_convnext(block, own):
        widths = [m.out_features for m in block.modules() if isinstance(m, nn.Linear)]
        widths += [m.out_channels for m in block.modules() if isinstance(m, nn.Conv2d)]
        return min(widths)  # all but the MLP's wide layer have the block's channels
    place = model.get_submodule(name)
    kinds = ["num_features", "num_channels", "normalized_shape", "out_channels", "out_features"]
    members = list(place.modules())
    if instead:
        kinds = ["in_channels", "in_features"]
    else:
        members.reverse()
    for module in members:
        for attribute in kinds:
            value = getattr(module, attribute, None)
            value = value[-1] if isinstance(value, tuple | list) and value else value
            if isinstance(value, int):
                return value
    raise ValueError(f"cannot tell how many channels {name} puts out: {_REMEDY}")


def _spatial_axes(model: nn.Module, name: str) -> int:
    """Counts the spatial axes of the output of module `name`: of its last layer that tells them."""
    place, (block, _) = model.get_submodule(name), _parent(model, name)
    of_eca = {inner for m in block.modules() if _is_eca(m) for inner in m.modules()}
    for module in (*reversed(list(place.modules())), *reversed(list(block.modules()))):
        for axes, kinds in AXES.items():
            if isinstance(module, kinds) and module not in of_eca:
                return axes
    return 2


def _insert(model: nn.Module, name: str, layer: nn.Module, instead: bool, slot: str) -> str:
    """Puts `layer` in, in the place of module `name` or after it, and returns its own name."""
    place = model.get_submodule(name)
    parent, own = _parent(model, name)
    weight = next(place.parameters(), next(model.parameters(), torch.empty(0)))
    layer.to(weight.device, weight.dtype).train(place.training)
    if instead:
        setattr(parent, own, layer)
        return name
    if _ends_convnext(parent, own):  # nothing in it has a name to keep; dropping comes after ECA
        setattr(parent, own, nn.Sequential())
        getattr(parent, own).add_module(slot, layer)
        getattr(parent, own).add_module("drop", place)
        return f"{name}.{slot}"
    if _runs_in_order(parent) and own == list(parent._modules)[-1]:
        parent.append(layer)  # the released name of ECA in MobileNetV2: features.2.conv.4
        return name.rpartition(".")[0] + f".{len(parent) - 1}"
    if _runs_in_order(place):
        place.add_module(slot, layer)
        return f"{name}.{slot}"
    seat = WithECA(place, layer, slot)
    for module in list(model.modules()):  # wherever it stands: it may be used in several places
        for key, child in module._modules.items():
            if child is place and module is not seat:
                setattr(module, key, seat)
    return f"{name}.{slot}"


def _check_place(model: nn.Module, name: str) -> None:
    """Raises a ValueError where no module can stand in the place of `name`."""
    place = model.get_submodule(name)
    if _runs_in_order(place):
        return
    if place is model:
        raise ValueError(f"ECA cannot stand behind the whole {type(model).__name__}: {_REMEDY}")
    parameters = inspect.signature(place.forward).parameters.values()
    single = [p for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    if sum(p.default is p.empty for p in single) > 1:
        raise ValueError(
            f"{name} takes more than one tensor, so ECA cannot stand behind it: {_REMEDY}"
        )


def _ends_convnext(parent: nn.Module, own: str) -> bool:
    """Whether it is where timm's ConvNeXt block has its branch in the layout of the addition."""
    return own == "drop_path" and type(parent).__name__ == "ConvNeXtBlock"


def _runs_in_order(module: nn.Module) -> TypeGuard[nn.Sequential]:
    return isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward


def _parent(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, own = name.rpartition(".")
    return model.get_submodule(path), own
