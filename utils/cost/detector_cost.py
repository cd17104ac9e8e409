"""Counts parameters, multiply-adds and published FLOPs of torchvision detectors, on `meta`.

What is counted is one image of 800 × 1280: backbone, pyramid, the RPN's or RetinaNet's head on
every level, the box head on 1000 regions and the mask head on 100. Nothing is computed: meta
tensors have shapes only, so a ResNet-101 takes a second and no memory.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

SIZE = (800, 1280)  # of the published table: height, width
BOX_REGIONS = 1000
MASK_REGIONS = 100

Rule = Callable[[str, nn.Module, Tensor, Tensor], int]  # (name, leaf, its input, its output)


def trainable_parameters(network: nn.Module) -> int:
    """Counts the elements of parameters that a gradient reaches: the published `Param.`."""
    return sum(p.numel() for p in network.parameters() if p.requires_grad)


def detection_macs(network: nn.Module, size: tuple[int, int] = SIZE) -> int:
    """Counts multiply-adds of convolutions and linear layers, bias left out.

    Args:
        network: one of torchvision's FasterRCNN, MaskRCNN and RetinaNet, on any device; it is not
            changed.
        size: height and width of the image as the backbone sees it.

    Raises:
        ValueError: for a network of another kind.
    """
    return _count(network, size, _macs)


def published_detection_flops(network: nn.Module, size: tuple[int, int] = SIZE) -> int:
    """Counts FLOPs by the rule of the published COCO table; at `SIZE` all its digits agree.

    A multiply-add counts 1. On top of `detection_macs` come 1 for each output with a convolution's
    bias (not a linear layer's), 2 for each element into BatchNorm, 1 for each out of a ReLU (not
    the RPN's), and 1 for each input of max pooling and of the attention's average pool. The tool
    behind the table took a transposed convolution's weights once for each output, four times too
    many here. RoIAlign, NMS, interpolation, sigmoids and the attention's product count nothing.
    The arguments and errors are those of `detection_macs`.
    """
    return _count(network, size, _published)


def _macs(name: str, leaf: nn.Module, x: Tensor, y: Tensor) -> int:
    if isinstance(leaf, _ConvTransposeNd):
        return x.numel() * leaf.weight[0].numel()
    if isinstance(leaf, _ConvNd):
        return y.numel() * leaf.weight[0].numel()
    if isinstance(leaf, nn.Linear):
        return y.numel() * leaf.in_features
    return 0


def _published(name: str, leaf: nn.Module, x: Tensor, y: Tensor) -> int:
    if isinstance(leaf, _ConvNd):
        if isinstance(leaf, _ConvTransposeNd):  # over output positions: the table's slip
            positions = y.numel() // leaf.out_channels
            return positions * leaf.weight.numel() + _bias(leaf, y)
        return _macs(name, leaf, x, y) + _bias(leaf, y)
    if isinstance(leaf, nn.Linear):
        # torchvision calls ReLU as a function after its box head's two linear layers; the authors'
        # were modules.
        return _macs(name, leaf, x, y) + (y.numel() if "box_head" in name else 0)
    if isinstance(leaf, _BatchNorm):
        return 2 * x.numel()
    if isinstance(leaf, nn.ReLU):
        return 0 if name.startswith("rpn.") else y.numel()
    if isinstance(leaf, (nn.MaxPool2d, nn.AdaptiveAvgPool2d)):
        return x.numel()
    return 0


def _bias(leaf: nn.Module, y: Tensor) -> int:
    return 0 if leaf.bias is None else y.numel()


def _count(network: nn.Module, size: tuple[int, int], rule: Rule) -> int:
    missing = [name for name in ("backbone", "transform") if not hasattr(network, name)]
    if missing or not (hasattr(network, "rpn") or hasattr(network, "head")):
        raise ValueError(f"{type(network).__name__} is not a detector such as mask_rcnn")
    network = copy.deepcopy(network).to("meta").eval()
    with torch.no_grad(), _watched(network, rule) as counts:
        features = network.backbone(torch.empty(1, 3, *size, device="meta"))
        levels = list(features.values())
        if hasattr(network, "head"):
            network.head(levels)
            return sum(counts)
        heads, channels = network.roi_heads, network.backbone.out_channels
        network.rpn.head(levels)
        regions = _regions(BOX_REGIONS, channels, heads.box_roi_pool.output_size)
        heads.box_predictor(heads.box_head(regions))
        if heads.has_mask():
            regions = _regions(MASK_REGIONS, channels, heads.mask_roi_pool.output_size)
            heads.mask_predictor(heads.mask_head(regions))
    return sum(counts)


def _regions(number: int, channels: int, size: tuple[int, int]) -> Tensor:
    return torch.empty(number, channels, *size, device="meta")


@contextmanager
def _watched(network: nn.Module, rule: Rule) -> Iterator[list[int]]:
    """Collects `rule` over every call of a module without children."""
    counts: list[int] = []

    def watch(name: str, leaf: nn.Module):
        return leaf.register_forward_hook(
            lambda _, inputs, output: counts.append(rule(name, leaf, inputs[0], output))
        )

    hooks = [watch(name, m) for name, m in network.named_modules() if not any(m.children())]
    try:
        yield counts
    finally:
        for hook in hooks:
            hook.remove()
