"""Counts a classifier's layers from the input: for a learning rate by layer, and for freezing."""

from torch import nn

from .classifier import Classifier, Stage
from .eca_mobilenetv2 import STAGES, MobileNetV2

BACKBONE, FIRST_STAGES = "backbone", "stages:"


def layer_scales(network: Classifier, decay: float) -> dict[str, float]:
    """Returns factors of the learning rate, by the parameters' names.

    The last layer has 1, each block before it `decay` times the factor of the next one, and the
    stem the smallest (Bao et al. 2022, with timm's count of layers).
    """
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
        ValueError: neither, or more stages than there are.
    """
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


def _parts(network: nn.Module) -> list[list[str]]:
    """Returns the names of the modules of the stem, and of each stage."""
    if not isinstance(network, MobileNetV2):
        return [["conv1", "bn1"], *([f"layer{i}"] for i in (1, 2, 3, 4))]
    parts, first = [["features.0"]], 1
    for _, _, blocks, _ in STAGES:
        parts.append([f"features.{i}" for i in range(first, first + blocks)])
        first += blocks
    return parts
