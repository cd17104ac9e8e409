"""Counts parameters and FLOPs of classifiers and detectors, each by a named convention."""

import copy
import math
import warnings
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.utils.flop_counter import FlopCounterMode

from models.insertion import WithECA
from utils.inspection.published import COCO_SIZE
from utils.system.errors import UserError

Shape = tuple[int, ...]

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)

CONVENTIONS = {  # attribute of Cost and Layer: its title, and what it counts
    "mid_2019": (
        "thop mid-2019",
        "multiply-adds of convolutions, 4 per element of a BatchNorm, 1 of a ReLU, area + 1 per"
        " output of a pooling module, 2 in - 1 per output of a linear layer; of a module called"
        " again its last call. Summed in single precision, as then. The published FLOPs are these.",
    ),
    "thop_today": (
        "thop {version}",
        "what the installed thop counts: multiply-adds of convolutions and linear layers, 4 per"
        " element of a BatchNorm, area + 1 per output of a pooling module, nothing for a ReLU.",
    ),
    "multiply_adds": (
        "MACs",
        "multiply-adds of convolutions and matrix products and nothing else: half of what"
        " torch.utils.flop_counter counts, which is independent of thop.",
    ),
}


@dataclass
class Layer:
    """Holds one module without children, as it was met on a forward pass."""

    name: str  # dotted, as in the state dict
    kind: str  # the class
    output: Shape  # of its last call
    calls: int
    params: int
    mid_2019: int = 0  # of its last call: see `mid_2019_ops`
    thop_today: int = 0
    multiply_adds: int = 0


@dataclass
class Cost:
    """Holds what one forward pass costs, for the input shape it was counted on. All exact."""

    params: int
    mid_2019: int
    thop_today: int
    multiply_adds: int
    layers: list[Layer]  # in the order of their first call

    @property
    def mid_2019_printed(self) -> int:
        """Returns what thop of mid-2019 showed: the sum in single precision, 24 bits."""
        return int(torch.tensor(self.mid_2019, dtype=torch.float32).item())


def count_parameters(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def count_cost(network: nn.Module, input_shape: Shape) -> Cost:
    """Counts one forward pass in eval mode, by all conventions. The network is left as it was.

    Args:
        network: takes a tensor of `input_shape`; one on the `meta` device will do.
        input_shape: such as (1, 3, 224, 224). Counts grow with its first number, the batch.
    """
    network, image = _prepared(network, input_shape)
    with torch.no_grad():
        macs = multiply_adds(network, image)
        watched = _watch(network)
        today = thop_today(network, image)
    layers = list(watched.values())
    for layer in layers:
        layer.multiply_adds = macs.get(layer.name, 0)
        layer.thop_today = today.get(layer.name, 0)
    return Cost(
        params=count_parameters(network),
        mid_2019=sum(layer.mid_2019 for layer in layers),
        thop_today=today[""],
        multiply_adds=macs[""],
        layers=layers,
    )


def mid_2019_flops(network: nn.Module, input_shape: Shape) -> int:
    """Counts as thop of mid-2019 did, exactly, and by no other convention, which takes longer."""
    network, image = _prepared(network, input_shape)
    watched = _watch(network)
    with torch.no_grad():
        network(image)
    return sum(layer.mid_2019 for layer in watched.values())


def _prepared(network: nn.Module, input_shape: Shape) -> tuple[nn.Module, Tensor]:
    """Returns a copy, as thop leaves buffers on what it profiles, and an image of zeros.

    On `meta` each BatchNorm of the copy returns its input, which has the shape that the next layer
    needs: working out that shape takes three quarters of the time of a forward pass. No count
    depends on it: the hooks are called all the same, and flop_counter counts nothing for it.
    """
    network = copy.deepcopy(network).eval()
    parameter = next(network.parameters(), None)
    image = torch.zeros(input_shape, device="meta" if parameter is None else parameter.device)
    for module in network.modules():
        if isinstance(module, WithECA):  # it would show thop's buffers of the module inside it
            module.__class__ = nn.Sequential  # type: ignore[assignment]
        if image.is_meta and isinstance(module, BATCH_NORMS):
            vars(module)["forward"] = lambda x: x
    return network, image


def mid_2019_ops(module: nn.Module, x: Tensor, y: Tensor) -> int:
    """Returns what thop of mid-2019 counted for one call x → y of a module; 0 if unknown to it.

    A mixture, kept because the published figures are its: a convolution counts multiply-adds, a
    linear layer both halves, a convolution's bias once per input channel; and of several calls of a
    module, as of a block's shared ReLU, the last one stands.
    """
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        taps = math.prod(module.kernel_size) + (module.bias is not None)
        return module.in_channels * y.numel() * taps // module.groups
    if isinstance(module, BATCH_NORMS):
        return 4 * x.numel()
    if isinstance(module, nn.ReLU | nn.ReLU6):
        return x.numel()
    if isinstance(module, nn.AdaptiveAvgPool1d | nn.AdaptiveAvgPool2d | nn.AdaptiveAvgPool3d):
        area = math.prod(i // o for i, o in zip(x.shape[2:], y.shape[2:], strict=True))
        return (area + 1) * y.numel()
    if isinstance(module, nn.Linear):
        return (2 * module.in_features - 1) * y.numel()
    return 0


def _watch(network: nn.Module) -> dict[str, Layer]:
    """Returns a table that a forward pass fills with the layers and their mid-2019 counts."""
    layers: dict[str, Layer] = {}
    names = {module: name for name, module in network.named_modules()}

    def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        name, kind = names[module], type(module).__name__
        layer = layers.setdefault(name, Layer(name, kind, (), 0, count_parameters(module)))
        layer.output = tuple(output.shape)
        layer.calls += 1
        layer.mid_2019 = mid_2019_ops(module, inputs[0], output)

    for module in names:
        if not any(module.children()):
            module.register_forward_hook(hook)
    return layers


def multiply_adds(network: nn.Module, image: Tensor) -> dict[str, int]:
    """Returns multiply-adds of convolutions and matrix products of a forward pass, by module name.

    The key "" is the whole. torch.utils.flop_counter counts where an operator is dispatched, so it
    sees functional calls too; it counts 2 a multiply-add and nothing for any other operation.
    """
    with FlopCounterMode(display=False) as counter:
        network(image)
    # Keys are "Global" and "ResNet", "ResNet.layer1.0.conv1", ...: the class stands for the root.
    by_name = {"": counter.get_total_flops() // 2}
    for key, operators in counter.get_flop_counts().items():
        _, dot, name = key.partition(".")
        if dot:
            by_name[name] = sum(operators.values()) // 2
    return by_name


def thop_today(network: nn.Module, image: Tensor) -> dict[str, int]:
    """Returns what the installed thop counts for a forward pass, by module name; "" is the whole.

    thop 0.1.1 counts multiply-adds of convolutions and linear layers (no bias), 2 or 4 per element
    of a BatchNorm (without or with affine), (area + 1) per output of an adaptive average pool, and
    nothing for a ReLU. It leaves buffers on the network: give it a copy.

    Raises:
        UserError: thop, or setuptools, which it needs from Python 3.12 on, is not installed.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # on distutils, which thop needs
        try:
            import thop  # here, because nothing else needs distutils
        except ImportError as error:
            raise UserError(
                f"thop cannot be imported ({error}): pip install thop setuptools"
            ) from error
        for module in network.modules():
            for name in ("total_ops", "total_params"):
                # thop begins with the innermost: a wrapper that shows what is in it has these then.
                module.register_buffer(name, torch.zeros(1, dtype=torch.float64))
        total, _, tree = thop.profile(network, (image,), verbose=False, ret_layer_info=True)
    by_name = {"": int(total)}
    branches = [("", tree)]
    for prefix, branch in branches:
        for name, (ops, _, inner) in branch.items():
            by_name[prefix + name] = int(ops)
            branches.append((f"{prefix}{name}.", inner))
    return by_name


def thop_version() -> str:
    """Returns a version such as 0.1.1, without the date that thop's wheels append."""
    return metadata.version("thop").replace("-", ".post").partition(".post")[0]


def format_params(params: int, base: int = 1024) -> str:
    """Formats as published: 25557112 → 24.37M, M = 2^20; with base 1000 → 25.56M, M = 10^6."""
    return f"{params / base**2:.2f}M"


def format_flops(flops: int, base: int = 1024) -> str:
    """Formats as published: 4147691520 → 3.86G and 335449024 → 319.9M, with 2^30 and 2^20.

    Args:
        base: 1024, or 1000 for units of 10^9 and 10^6.
    """
    return f"{flops / base**3:.2f}G" if flops >= base**3 else f"{flops / base**2:.1f}M"


BOX_REGIONS, MASK_REGIONS = 1000, 100  # of the published COCO table


def detection_macs(network: nn.Module, size: tuple[int, int] = COCO_SIZE) -> int:
    """Counts multiply-adds of convolutions and linear layers, bias left out.

    Args:
        network: torchvision's FasterRCNN, MaskRCNN or RetinaNet, on any device; it is not changed.
        size: height and width of the image as the backbone sees it.

    Raises:
        ValueError: for a network of another kind.
    """
    with FlopCounterMode(display=False) as counter:
        _run_detector(_on_meta(network), size)
    return int(counter.get_total_flops()) // 2


def published_detection_flops(network: nn.Module, size: tuple[int, int] = COCO_SIZE) -> int:
    """Counts FLOPs by the rule of the published COCO table; at `COCO_SIZE` all its digits agree.

    A multiply-add counts 1. On top of `detection_macs` come 1 for each output with a convolution's
    bias (not a linear layer's), 2 for each element into BatchNorm, 1 for each out of a ReLU (not
    the RPN's), and 1 for each input of max pooling and of the attention's average pool. The tool
    behind the table took a transposed convolution's weights once for each output, four times too
    many here. RoIAlign, NMS, interpolation, sigmoids and the attention's product count nothing.
    The arguments and errors are those of `detection_macs`.
    """
    network = _on_meta(network)
    counts: list[int] = []
    names = {module: name for name, module in network.named_modules()}

    def count(leaf: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        counts.append(_published_ops(names[leaf], leaf, inputs[0], output))

    for module in names:
        if not any(module.children()):
            module.register_forward_hook(count)
    _run_detector(network, size)
    return sum(counts)


def _published_ops(name: str, leaf: nn.Module, x: Tensor, y: Tensor) -> int:
    if isinstance(leaf, _ConvNd):
        bias = 0 if leaf.bias is None else y.numel()
        if isinstance(leaf, _ConvTransposeNd):  # over output positions: the table's slip
            return y.numel() // leaf.out_channels * leaf.weight.numel() + bias
        return y.numel() * leaf.weight[0].numel() + bias
    if isinstance(leaf, nn.Linear):
        # torchvision calls ReLU as a function after its box head's two linear layers; the authors'
        # were modules.
        return y.numel() * (leaf.in_features + ("box_head" in name))
    if isinstance(leaf, _BatchNorm):
        return 2 * x.numel()
    if isinstance(leaf, nn.ReLU):
        return 0 if name.startswith("rpn.") else y.numel()
    if isinstance(leaf, (nn.MaxPool2d, nn.AdaptiveAvgPool2d)):
        return x.numel()
    return 0


def _on_meta(network: nn.Module) -> nn.Module:
    if not hasattr(network, "backbone") or not (
        hasattr(network, "rpn") or hasattr(network, "head")
    ):
        raise ValueError(f"{type(network).__name__} is not a detector such as mask_rcnn")
    return copy.deepcopy(network).to("meta").eval()


@torch.no_grad()
def _run_detector(network: Any, size: tuple[int, int]) -> None:
    """Runs a detector on `meta`: backbone and heads, with as many regions as the table counts."""
    levels = list(network.backbone(torch.empty(1, 3, *size, device="meta")).values())
    if hasattr(network, "head"):
        network.head(levels)
        return
    heads = network.roi_heads

    def regions(number: int, pool: Any) -> Tensor:
        return torch.empty(number, network.backbone.out_channels, *pool.output_size, device="meta")

    network.rpn.head(levels)
    heads.box_predictor(heads.box_head(regions(BOX_REGIONS, heads.box_roi_pool)))
    if heads.has_mask():
        heads.mask_predictor(heads.mask_head(regions(MASK_REGIONS, heads.mask_roi_pool)))
