"""What a network costs, by three conventions that disagree, each named for what it counts.

- `mid_2019`: the rule of thop as it was when the ECA-Net tables were made. Published FLOPs are its.
- `thop_today`: the thop that is installed.
- `multiply_adds`: torch.utils.flop_counter, the independent check.

Published "M" and "G" are 2^20 and 2^30. Nothing here needs weights: a network built on the `meta`
device, where tensors have a shape and no memory, is counted at no cost.
"""

import copy
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from utils.errors import UserError

MEBI, GIBI = 2**20, 2**30

Shape = tuple[int, ...]


@dataclass
class Layer:
    """One module without children, as it was met on a forward pass."""

    name: str  # dotted, as in the state dict
    kind: str  # the class
    output: Shape  # of its last call
    calls: int
    params: int
    mid_2019: int  # of its last call: see `mid_2019_ops`
    thop_today: int = 0
    multiply_adds: int = 0


@dataclass
class Cost:
    """What one forward pass costs, for the input shape it was counted on.

    Every figure is exact but `mid_2019_printed`, the same sum in the single precision in which thop
    then carried it: to the digit what its users were shown, some hundred units off.
    """

    params: int
    mid_2019: int
    thop_today: int
    multiply_adds: int
    layers: list[Layer]  # in the order of their first call

    @property
    def mid_2019_printed(self) -> int:
        return int(torch.tensor(self.mid_2019, dtype=torch.float32).item())


def count_parameters(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def count_cost(network: nn.Module, input_shape: Shape) -> Cost:
    """Counts one forward pass in eval mode, by all conventions. The network is left as it was.

    Args:
        network: takes a tensor of `input_shape`; the `meta` device will do.
        input_shape: such as (1, 3, 224, 224); counts grow with its first number, the batch.
    """
    network = copy.deepcopy(network).eval()  # thop leaves buffers on what it profiles
    parameter = next(network.parameters(), None)
    device = parameter.device if parameter is not None else torch.device("meta")
    image = torch.zeros(input_shape, device=device)
    with torch.no_grad():
        layers = _run_with_hooks(network, image)
        macs = multiply_adds(network, image)
        today = thop_today(network, image)  # last, for its buffers
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


def mid_2019_ops(module: nn.Module, x: Tensor, y: Tensor) -> int:
    """What thop of mid-2019 counted for one call x → y of a module; 0 for those it did not know.

    A mixture: a convolution counts multiply-adds, a linear layer counts both halves, and a bias of
    a convolution counts once per input channel. It is kept as it was, for the published figures are
    its. One more habit of it matters: a module that is called again overwrites what it had
    counted, so of the calls of a block's shared ReLU the last one stands.
    """
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        taps = math.prod(module.kernel_size) + (module.bias is not None)
        return module.in_channels * y.numel() * taps // module.groups
    if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d):
        return 4 * x.numel()
    if isinstance(module, nn.ReLU | nn.ReLU6):
        return x.numel()
    if isinstance(module, nn.AdaptiveAvgPool1d | nn.AdaptiveAvgPool2d | nn.AdaptiveAvgPool3d):
        area = math.prod(i // o for i, o in zip(x.shape[2:], y.shape[2:], strict=True))
        return (area + 1) * y.numel()
    if isinstance(module, nn.Linear):
        return (2 * module.in_features - 1) * y.numel()
    return 0


def _run_with_hooks(network: nn.Module, image: Tensor) -> list[Layer]:
    layers: dict[str, Layer] = {}

    def hook_for(name: str):
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            layer = layers.get(name)
            if layer is None:
                kind = type(module).__name__
                layer = layers[name] = Layer(name, kind, (), 0, count_parameters(module), 0)
            layer.output = tuple(output.shape)
            layer.calls += 1
            layer.mid_2019 = mid_2019_ops(module, inputs[0], output)

        return hook

    handles = [
        module.register_forward_hook(hook_for(name))
        for name, module in network.named_modules()
        if next(module.children(), None) is None
    ]
    try:
        network(image)
    finally:
        for handle in handles:
            handle.remove()
    return list(layers.values())


def multiply_adds(network: nn.Module, image: Tensor) -> dict[str, int]:
    """Multiply-adds of the convolutions and matrix products of a forward pass, by module name.

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
    """What the installed thop counts for a forward pass, by module name; the key "" is the whole.

    thop 0.1.1 counts multiply-adds of convolutions and linear layers (no bias), 2 or 4 per element
    of a BatchNorm (without or with affine), (area + 1) per output of an adaptive average pool, and
    nothing for a ReLU. It leaves buffers on the network: give it a copy.

    Raises:
        UserError: thop, or setuptools, which it needs from Python 3.12 on, is not installed.
    """
    with _quiet_thop() as thop:
        total, _, tree = thop.profile(network, (image,), verbose=False, ret_layer_info=True)
    by_name = {"": int(total)}

    def walk(branch: dict, prefix: str) -> None:
        for name, (ops, _, inner) in branch.items():
            by_name[prefix + name] = int(ops)
            walk(inner, f"{prefix}{name}.")

    walk(tree, "")
    return by_name


def thop_version() -> str:
    """Such as 0.1.1, without the date that thop's wheels append."""
    return metadata.version("thop").partition(".post")[0]


@contextmanager
def _quiet_thop() -> Iterator:
    """Imports thop here, because it alone needs distutils, and without its warnings about that."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        try:
            import thop
        except ImportError as error:
            raise UserError(
                f"thop cannot be imported ({error}): pip install thop setuptools"
            ) from error
        yield thop


def format_params(params: int) -> str:
    """In the published manner: 25557112 → 24.37M, M = 2^20."""
    return f"{params / MEBI:.2f}M"


def format_flops(flops: int) -> str:
    """In the published manner: 4147691520 → 3.86G and 335449024 → 319.9M, with 2^30 and 2^20."""
    return f"{flops / GIBI:.2f}G" if flops >= GIBI else f"{flops / MEBI:.1f}M"
