"""Finds a network's stages, layers and attention, and records the gates that it computes.

Layers are counted from the input: for a learning rate by layer, and for freezing.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from .attention import _Gate
from .classifier import ArgumentError, Classifier, Stage
from .eca_mobilenetv2 import STAGE_OF_BLOCK, STAGES, InvertedResidual, MobileNetV2
from .eca_module import ECALayer
from .eca_resnet import ResNet

COARSEST = 32  # pixels a position of the last feature map; each before it is twice as fine


class AttentionLayer(NamedTuple):
    """One attention layer and where it stands; stages and blocks count from 1."""

    name: str  # in the network, such as layer3.0.eca
    stage: int
    block: int  # within the stage
    layer: nn.Module


def feature_maps(network: nn.Module) -> dict[str, nn.Module]:
    """Returns the modules that compute the last feature map of each resolution, finest first.

    For ResNet they are layer1 to layer4, with maps of 1/4 to 1/32 of the input's side. MobileNetV2
    has maps of 1/2 to 1/32; the last one is the output of the 1280-channel convolution.
    """
    if isinstance(network, ResNet) or hasattr(network, "layer4"):
        return {f"layer{i}": network.get_submodule(f"layer{i}") for i in (1, 2, 3, 4)}
    if hasattr(network, "insertions"):
        return _library_maps(network)
    features = _mobilenet(network).features
    last = len(STAGE_OF_BLOCK) + 1
    ends = [
        STAGE_OF_BLOCK.index(
            stage
        )  # the module before the stage's first, as features.0 is the stem
        for stage, (*_, stride) in enumerate(STAGES)
        if stride == 2
    ]
    return {f"features.{i}": features[i] for i in (*ends, last)}


def _library_maps(network: nn.Module) -> dict[str, nn.Module]:
    """Returns the modules of which timm's networks say that they end a resolution."""
    named, described = dict(network.named_modules()), getattr(network, "feature_info", ())
    names = [str(info.get("module")) for info in described if isinstance(info, dict)]
    if not names or not all(name in named for name in names):
        raise ValueError(f"{network.arch} does not name its feature maps, so there are none")
    return {name: named[name] for name in names}


def attention_layers(network: nn.Module) -> list[AttentionLayer]:
    """Returns the layers that weigh whole channels, see `gate`, first to last.

    An attention of another kind, with weights for positions, is not among them.
    """
    layers = every_attention(network)
    return [entry for entry in layers if isinstance(entry.layer, ECALayer | _Gate)]


def every_attention(network: nn.Module) -> list[AttentionLayer]:
    """Returns a network's attention layers of any kind, first to last.

    In a library's network those are what was put in; its stages are what has the same channels.
    """
    entries = []
    if not isinstance(network, Classifier) and hasattr(network, "insertions"):
        stage, block, before = 0, 0, 0
        for name, _, channels, *_ in network.insertions:  # type: ignore[union-attr]
            stage, block = (stage, block + 1) if channels == before else (stage + 1, 1)
            before = channels
            entries.append(AttentionLayer(name, stage, block, network.get_submodule(name)))
        return entries
    if isinstance(network, ResNet):
        for stage, name in enumerate(feature_maps(network), 1):
            for i, block in enumerate(getattr(network, name)):
                if block.slot:
                    layer = getattr(block, block.slot)
                    entries.append(AttentionLayer(f"{name}.{i}.{block.slot}", stage, i + 1, layer))
        return entries
    features = _mobilenet(network).features
    for i, stage in enumerate(STAGE_OF_BLOCK):
        inside = cast(InvertedResidual, features[i + 1]).conv
        last = len(inside) - 1
        if not isinstance(inside[last], nn.BatchNorm2d):
            block = i - STAGE_OF_BLOCK.index(stage) + 1
            name = f"features.{i + 1}.conv.{last}"
            entries.append(AttentionLayer(name, stage + 1, block, inside[last]))
    return entries


def attention_parameters(network: nn.Module) -> dict[str, Tensor]:
    """Returns the parameters of a network's attention layers, by their names in its state dict."""
    return {
        f"{entry.name}.{name}": value
        for entry in every_attention(network)
        for name, value in entry.layer.state_dict().items()
    }


def gate(layer: nn.Module, x: Tensor) -> Tensor:
    """Computes the factors that an attention layer gives x's channels: (N, C, H, W) → (N, C)."""
    y = x.mean((2, 3))
    if isinstance(layer, ECALayer):
        factors = torch.sigmoid(layer.conv(y.unsqueeze(1))).squeeze(1)
        gain = getattr(layer, "gain", None)  # of a layer that was put in as identity
        return factors if gain is None else gain * factors
    return torch.sigmoid(cast(_Gate, layer).f(y))


@contextmanager
def recorded_gates(network: nn.Module) -> Iterator[dict[str, Tensor]]:
    """While open, each forward pass stores every attention layer's gate (N, C) under its name."""
    gates: dict[str, Tensor] = {}

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor], Tensor], None]:
        def record(layer: nn.Module, inputs: tuple[Tensor], _: Tensor) -> None:
            gates[name] = gate(layer, inputs[0])

        return record

    handles = [a.layer.register_forward_hook(watch(a.name)) for a in attention_layers(network)]
    try:
        yield gates
    finally:
        for handle in handles:
            handle.remove()


def _mobilenet(network: nn.Module) -> MobileNetV2:
    if not isinstance(network, MobileNetV2):
        raise ValueError(f"a network of models.MODELS is wanted, not {type(network).__name__}")
    return network


def grad_cam(
    network: nn.Module, stage: nn.Module, images: Tensor, classes: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Computes class-activation maps (Grad-CAM) of a batch.

    Args:
        network: (N, 3, H, W) → logits (N, C), in eval mode. With `requires_grad_(False)` on its
            parameters the layers before `stage` keep no graph.
        stage: the part of the network whose output (N, c, h, w) is explained.
        images: (N, 3, H, W).
        classes: (N,) the class that each map is for; by default the one with the highest logit.

    Returns:
        logits (N, C) and maps (N, h, w), each from 0 to a maximum of 1. A map is all 0 when
        nothing in the image raises the logit of the class.
    """
    seen = []

    def cut(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        seen.append(output.detach().requires_grad_())  # the graph begins here
        return seen[-1]

    handle = stage.register_forward_hook(cut)
    try:
        with torch.enable_grad():
            logits = network(images)
            chosen = logits.detach().argmax(1) if classes is None else classes
            score = logits.gather(1, chosen[:, None]).sum()
            (gradient,) = torch.autograd.grad(score, seen[-1])
    finally:
        handle.remove()
    features = seen[-1].detach()
    weights = gradient.mean((2, 3), keepdim=True)  # eq. 1 of the paper
    maps = (weights * features).sum(1).clamp_(min=0).float()  # eq. 2
    peak = maps.amax((1, 2), keepdim=True)
    return logits.detach(), maps / torch.where(peak > 0, peak, 1)


BACKBONE, FIRST_STAGES = "backbone", "stages:"


def layer_scales(network: Classifier, decay: float) -> dict[str, float]:
    """Returns factors of the learning rate, by the parameters' names.

    The last layer has 1, each block before it `decay` times the factor of the next one, and the
    stem the smallest (Bao et al. 2022, with timm's count of layers).
    """
    if not isinstance(network, Classifier):
        raise ArgumentError(
            f"`layer_decay={decay:g}` is for our networks: leave it out", layer_decay=f"{decay:g}"
        )
    numbers: dict[str, int] = {}
    last = 0
    for name, child in network.named_children():
        blocks = list(child.named_children()) if isinstance(child, Stage) else [("", child)]
        for inner, block in blocks:
            prefix = f"{name}.{inner}." if inner else f"{name}."
            own = [prefix + parameter for parameter, _ in block.named_parameters()]
            if own and (hasattr(type(block), "drop_path") or network.head.startswith(name)):
                last += 1  # a block or the last layer; a convolution on its own adds no layer
            numbers |= dict.fromkeys(own, last)
    return {name: decay ** (last - number) for name, number in numbers.items()}


def freeze(network: Classifier, what: str) -> None:
    """Stops the training of a network's first layers, for good, in place.

    Their parameters need no gradient from now on, and they stay in evaluation mode, in which
    BatchNorm neither uses a batch's statistics nor changes its own.

    Args:
        what: "backbone" for all but the last layer; "stages:N" for the stem and the first N
            stages, of which a ResNet has 4 and MobileNetV2 7.

    Raises:
        ValueError: neither, or more stages than there are; or stages of a library's network.
    """
    if not isinstance(network, Classifier):
        if what != BACKBONE:
            raise ValueError(
                f"{what} is for our networks: use 'backbone' for all but the last layer"
            )
        network.frozen = tuple(_without(network, set(network.head_names)))
        for name, parameter in network.named_parameters():
            parameter.requires_grad_(name in network.head_names)
        for name in network.frozen:
            frozen = network.get_submodule(name)
            frozen.train = MethodType(_stay_in_evaluation, frozen)  # also in a copy of the network
        network.train(network.training)
        return
    stem, *stages = _parts(network)
    if what == BACKBONE:
        names = [n for n, child in network.named_children() if not network.head.startswith(n)]
        names = [n for n in names if any(True for _ in network.get_submodule(n).parameters())]
    else:
        count = what.removeprefix(FIRST_STAGES)
        if not what.startswith(FIRST_STAGES) or not count.isdecimal():
            raise ValueError(f"cannot freeze {what!r}: use 'backbone', or 'stages:2' and the like")
        if int(count) > len(stages):
            raise ValueError(
                f"{network.arch} has {len(stages)} stages: 'stages:{int(count)}' are more; use "
                "'backbone' for all but the last layer"
            )
        names = [name for stage in (stem, *stages[: int(count)]) for name in stage]
    for name in names:
        network.get_submodule(name).requires_grad_(False)
    network.frozen = tuple(names)
    network.train(network.training)


def _without(network: nn.Module, parameters: set[str], prefix: str = "") -> Iterator[str]:
    """Yields the largest modules that hold none of these parameters, but others."""
    for name, child in network.named_children():
        own = {f"{prefix}{name}.{inner}" for inner, _ in child.named_parameters()}
        if own & parameters:
            yield from _without(child, parameters, f"{prefix}{name}.")
        elif own:
            yield prefix + name


def _stay_in_evaluation(module: nn.Module, mode: bool = True) -> nn.Module:
    return nn.Module.train(module, False)


def _parts(network: nn.Module) -> list[list[str]]:
    """Returns the names of the modules of the stem, and of each stage."""
    if not isinstance(network, MobileNetV2):
        return [["conv1", "bn1"], *([f"layer{i}"] for i in (1, 2, 3, 4))]
    parts, first = [["features.0"]], 1
    for _, _, blocks, _ in STAGES:
        parts.append([f"features.{i}" for i in range(first, first + blocks)])
        first += blocks
    return parts
