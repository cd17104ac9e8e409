"""Rebuilds a network for inference: it computes the same with fewer passes over its activations.

BatchNorm is folded into the convolutions, ReLU is computed with them, activations have the
channels_last layout, and on a CPU the weights are packed once (see `packed_convolution`).

Where a block's last convolution is 1×1 and has more outputs than inputs, ECA's gate is computed
from its input h. Pooling is linear, so GAP(W h + b) = W GAP(h) + b, and a bottleneck's h is four
times smaller than W h. ECA's convolution along the channels is linear as well: a matrix K with k
diagonals. So the gate is sigmoid(K W GAP(h) + K b), one small product with K W known beforehand.
The scaling by the gate, the addition and ReLU are then one pass over the convolution's output.
"""

import copy
import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn

from .eca_mobilenetv2 import ConvBNReLU, InvertedResidual, MobileNetV2
from .eca_resnet import BasicBlock, Bottleneck, ResNet
from .fused.stock_modules import has_hooks, is_bare, remember
from .inference_block import InferenceBlock, folded
from .packed_convolution import PackedConv2d


def fastest_dtype(device: torch.device | str) -> torch.dtype:
    """Returns bfloat16 if the device multiplies matrices faster in it, otherwise float32.

    bfloat16 is for CUDA from compute capability 8.0, and for CPUs with AVX512-BF16 or AMX. Others
    emulate it, and are many times slower.
    """
    device = torch.device(device)
    if device.type == "cuda":
        with torch.cuda.device(device):
            return torch.bfloat16 if torch.cuda.is_bf16_supported(False) else torch.float32
    if device.type == "cpu" and (
        torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    ):
        return torch.bfloat16
    return torch.float32


class InferenceNetwork(nn.Module):
    """Images in any floating dtype and layout → float32 logits, without gradients.

    `network` is the rebuilt network; it has the attributes of the original (arch, num_classes, …).
    """

    def __init__(self, network: nn.Module, dtype: torch.dtype, compiled: bool):
        super().__init__()
        self.network = network
        self.dtype = dtype
        self.compiled = compiled
        self.run = torch.compile(network) if compiled else network

    def train(self, mode: bool = True) -> "InferenceNetwork":
        """Stays in eval mode: there is nothing left to train."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        x = x.to(dtype=self.dtype, memory_format=torch.channels_last)
        with _frozen_weights() if self.compiled else nullcontext():
            return self.run(x).float()


@functools.cache  # each patch made anew would stay in memory
def _frozen_weights() -> AbstractContextManager:
    """While open, torch.compile treats weights as constants, and chooses their layout itself.

    torch.compile's own option for it has no effect: the graph is captured before that option is
    read, and the capture decides which tensors are constants.
    """
    import torch._inductor.config  # takes seconds, and most have nothing to compile

    return torch._inductor.config.patch(freezing=True)


class _PixelMean(nn.Module):
    """Mean over the pixels, (N, C, H, W) → (N, C, 1, 1): adaptive pooling exports as 11 nodes."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3), keepdim=True)


def _is_stock(module: nn.Module, attention: nn.Module | None = None) -> bool:
    """Tells whether the module and its children, except `attention`, are as this package made them.

    The kind of a BatchNorm is not checked here: `folded` refuses those that it cannot fold.
    """
    if module is attention:
        return True
    kind = type(module)
    norm = isinstance(module, nn.modules.batchnorm._NormBase | nn.GroupNorm | nn.LayerNorm)
    bare = not has_hooks(module) if norm else kind in REBUILT and is_bare(module, kind)
    return bare and all(_is_stock(child, attention) for child in module.children())


def _rebuilt_resnet_block(block: BasicBlock | Bottleneck) -> nn.Module:
    attention = getattr(block, block.slot) if block.slot else None
    if not _is_stock(block, attention) or type(block.relu) is not nn.ReLU:
        return block
    body = nn.Sequential(folded(block.conv1, block.bn1, "relu"))
    if isinstance(block, Bottleneck):
        body.append(folded(block.conv2, block.bn2, "relu"))
        last = folded(block.conv3, block.bn3)
    else:
        last = folded(block.conv2, block.bn2)
    shortcut = nn.Identity() if block.downsample is None else folded(*block.downsample)
    return InferenceBlock(body, last, attention, shortcut, activation=True)


def _rebuilt_conv_bn_relu(block: ConvBNReLU) -> nn.Module:
    if has_hooks(block) or len(block) != 3 or not _is_stock(nn.Sequential(*list(block)[:2])):
        return block
    conv, bn, activation = cast(tuple[nn.Conv2d, nn.BatchNorm2d, nn.Module], tuple(block))
    if type(activation) is nn.ReLU6 and is_bare(activation, nn.ReLU6):
        return folded(conv, bn, "relu6")
    return nn.Sequential(folded(conv, bn), activation)


def _rebuilt_inverted_residual(block: InvertedResidual) -> nn.Module:
    *parts, conv, bn, attention = block.conv if block.attends else (*block.conv, None)
    usual = is_bare(block, InvertedResidual) and is_bare(block.conv, nn.Sequential)
    stock = all(type(part) is ConvBNReLU and is_bare(part, ConvBNReLU) for part in parts)
    if not (usual and stock and type(conv) is nn.Conv2d and _is_stock(nn.Sequential(conv, bn))):
        return block
    body = nn.Sequential(*[_rebuilt_conv_bn_relu(cast(ConvBNReLU, part)) for part in parts])
    shortcut = nn.Identity() if block.residual else None
    return InferenceBlock(
        body, folded(conv, cast(nn.BatchNorm2d, bn)), attention, shortcut, activation=False
    )


REBUILDERS: dict[type[nn.Module], Callable[[Any], nn.Module]] = {
    BasicBlock: _rebuilt_resnet_block,
    Bottleneck: _rebuilt_resnet_block,
    ConvBNReLU: _rebuilt_conv_bn_relu,
    InvertedResidual: _rebuilt_inverted_residual,
}
REBUILT = {*REBUILDERS, nn.Conv2d, nn.ReLU, nn.ReLU6, nn.Sequential, nn.Identity}
remember(ResNet, MobileNetV2, *REBUILDERS)


def _rebuild(network: ResNet | MobileNetV2) -> None:
    """Replaces every block that is unchanged since this package made it, in place."""
    if isinstance(network, ResNet):
        _rebuild_stem(network)
        stages = [cast(nn.Sequential, network.get_submodule(f"layer{i}")) for i in (1, 2, 3, 4)]
    else:
        stages = [network.features]
    for stage in stages:
        for i, block in enumerate(stage):
            if type(block) not in REBUILDERS:  # a subclass may compute something else
                raise ValueError(f"a block of type {type(block).__name__} cannot be rebuilt")
            stage[i] = REBUILDERS[type(block)](block)


def _rebuild_stem(network: ResNet) -> None:
    stem = nn.Sequential(network.conv1, network.bn1, network.relu)
    if _is_stock(stem) and type(network.relu) is nn.ReLU:
        network.conv1 = folded(network.conv1, network.bn1, "relu")
        nothing = nn.Identity()
        for name in ("bn1", "relu"):
            setattr(network, name, nothing)
    pool = network.avgpool
    if is_bare(pool, nn.AdaptiveAvgPool2d) and pool.output_size in (1, (1, 1)):
        network.add_module("avgpool", _PixelMean())


def optimise_for_inference(
    model: nn.Module, dtype: torch.dtype | None = None, compile: bool = False
) -> InferenceNetwork:
    """Returns a faster network that computes what `model` computes in eval mode.

    `model` itself is not changed.

    Args:
        model: a ResNet or MobileNetV2 of this package, on the device it is to run on.
        dtype: of weights and activations; None for `fastest_dtype` of that device.
        compile: also use torch.compile, with the weights as constants. The first call takes about a
            minute, and so does the first call with another batch or image size. On a CPU it needs a
            C++ compiler.

    Returns:
        (N, 3, H, W) → (N, num_classes) logits in float32, without gradients. In float32 they agree
        with the model's within 1e-5 relative.

    Raises:
        ValueError: for another network, or one with other blocks or norms.
    """
    if not isinstance(model, ResNet | MobileNetV2):
        raise ValueError(
            f"optimise_for_inference takes a ResNet or MobileNetV2 of models, such as"
            f" create_model('eca_resnet50'), not {type(model).__name__}"
        )
    usual = is_bare(model, ResNet if isinstance(model, ResNet) else MobileNetV2)
    if not usual:
        raise ValueError("a network with hooks or another forward cannot be rebuilt: remove them")
    device = next(model.parameters()).device
    if dtype is None:
        dtype = fastest_dtype(device)
    network = copy.deepcopy(model)
    network.eval().requires_grad_(False)
    _rebuild(network)
    network.to(dtype).to(memory_format=torch.channels_last)
    if device.type == "cpu" and not compile:
        for module in network.modules():
            if isinstance(module, PackedConv2d):
                module.agrees()  # the trial belongs here, not into the first call
    return InferenceNetwork(network, dtype, compile).eval()
