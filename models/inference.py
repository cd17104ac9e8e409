"""A network rebuilt for inference: the same function, fewer passes over its activations.

BatchNorm is folded into the convolutions, ReLU is computed with them, activations stand in
channels_last, and on a CPU the weights are laid out once (see `packed_convolution`). Where a
block's last convolution is 1×1 and widens, ECA's gate is had before that convolution: pooling is
linear, so GAP(W h + b) = W GAP(h) + b, and a bottleneck's h is four times smaller than W h. ECA's
own convolution along the channels is linear as well, a matrix K with k diagonals, so that the gate
is sigmoid(K W GAP(h) + K b): one small product, with K W computed beforehand. What then remains of
ECA, the addition and ReLU is one pass over the convolution's output.
"""

import copy
import functools
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

from .eca_mobilenetv2 import ConvBNReLU, InvertedResidual, MobileNetV2
from .eca_module import ECALayer
from .eca_resnet import BasicBlock, Bottleneck, ResNet
from .fused.formulas import along_channels
from .fused.passes import finish_in_place, pixel_means
from .packed_convolution import PackedConv2d


def fastest_dtype(device: torch.device | str) -> torch.dtype:
    """bfloat16 where the device multiplies matrices in it faster than in float32, else float32.

    That is CUDA from compute capability 8.0 and CPUs with AVX512-BF16 or AMX; others emulate it,
    many times slower.
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


def _folded(conv: nn.Conv2d, bn: nn.BatchNorm2d, activation: str | None = None) -> PackedConv2d:
    """Builds a convolution that computes activation(bn(conv(x))) by bn's running statistics."""
    if not isinstance(bn, nn.BatchNorm2d | nn.SyncBatchNorm):
        raise ValueError(f"{type(bn).__name__} cannot be folded into a convolution as BatchNorm")
    if bn.running_mean is None:
        raise ValueError("BatchNorm without running statistics cannot be folded: train with them")
    wide = fuse_conv_bn_eval(copy.deepcopy(conv).double(), copy.deepcopy(bn).double())
    return PackedConv2d.of(wide.to(conv.weight.dtype), activation)


WIDEST_GATE_MATRIX = 512  # channels; beyond, a full matrix costs more than its k diagonals


def _gate_of(attention: ECALayer, last: nn.Conv2d, from_input: bool) -> nn.Conv2d:
    """Builds ECA's convolution as a 1×1 convolution of pooled values, before the sigmoid.

    Args:
        from_input: the values pooled are those of the 1×1 convolution `last`'s input, so that its
            weights are part of the product; otherwise of its output.
    """
    kernel = attention.conv.weight.detach().double().reshape(1, 1, -1)
    unit = torch.eye(last.out_channels, dtype=torch.float64, device=kernel.device)
    matrix = F.conv1d(unit[:, None], kernel, padding=kernel.shape[-1] // 2)[:, 0].T
    bias = None
    if from_input:
        bias = None if last.bias is None else matrix @ last.bias.detach().double()
        matrix = matrix @ last.weight.detach().double().flatten(1)
    with torch.device("meta"):
        gate = nn.Conv2d(matrix.shape[1], matrix.shape[0], 1, bias=bias is not None)
    dtype = last.weight.dtype
    weight = matrix.to(dtype).contiguous()[:, :, None, None]
    gate.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        gate.bias = nn.Parameter(bias.to(dtype), requires_grad=False)
    return gate


class InferenceBlock(nn.Module):
    """act(attention(last(body(x))) + shortcut(x)), with any of the three left out.

    Args:
        body: everything before the last convolution.
        last: the last convolution, BatchNorm folded in.
        attention: ECALayer, whose gate is computed here, another attention, or None.
        shortcut: a module (nn.Identity for x itself) or None for no addition.
        activation: ReLU after the addition.
    """

    def __init__(
        self,
        body: nn.Module,
        last: nn.Conv2d,
        attention: nn.Module | None,
        shortcut: nn.Module | None,
        activation: bool,
    ):
        super().__init__()
        self.body = body
        self.last = last
        self.attention = attention
        self.shortcut = shortcut
        self.activation = activation
        # A subclass with a forward of its own may have another gate: it is called as it is.
        self.gated = attention is not None and type(attention).forward is ECALayer.forward
        # An inverted residual's h is the larger one.
        pointwise = last.kernel_size == last.stride == (1, 1) and last.groups == 1
        self.gate_first = pointwise and last.in_channels < last.out_channels
        self.gate = None
        if self.gated and (self.gate_first or last.out_channels <= WIDEST_GATE_MATRIX):
            self.gate = _gate_of(attention, last, self.gate_first)

    def _pools_input(self, h: Tensor, z: Tensor) -> bool:
        """Tells whether pooling h and one product with the weights reads less than pooling z.

        At batch 1 and 7×7 pixels it does not: the weights outweigh both. An exported graph serves
        all sizes, so there the kind of the convolution decides.
        """
        if not self.gate_first or torch.compiler.is_exporting():
            return self.gate_first
        return h.numel() + self.gate.weight.numel() < z.numel()

    def _gate(self, h: Tensor, z: Tensor) -> Tensor:
        """ECA's (N, C), from the last convolution's input or output."""
        pools_input = self._pools_input(h, z)
        x = h if pools_input else z
        if self.gate is not None and pools_input == self.gate_first:
            weight, bias = self.gate.weight.flatten(1), self.gate.bias
            pooled = pixel_means(x)
            return F.linear(pooled.to(weight.dtype), weight, bias).to(pooled.dtype).sigmoid()
        pooled = pixel_means(x)
        kernel = self.attention.conv.weight.flatten().to(pooled.dtype)
        return along_channels(pooled, kernel).sigmoid()

    def _gate_for_export(self, h: Tensor, z: Tensor) -> Tensor:
        """ECA's (N, C, 1, 1) in operations that inference engines know from SE, and fuse."""
        return self.gate((h if self.gate_first else z).mean((2, 3), keepdim=True)).sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        h = self.body(x)
        z = self.last(h)
        identity = None if self.shortcut is None else self.shortcut(x)
        gate = None
        if self.gated and self.gate is not None and torch.compiler.is_exporting():
            z = z * self._gate_for_export(h, z)
        elif self.gated:
            gate = self._gate(h, z)
        elif self.attention is not None:
            z = self.attention(z)
        return finish_in_place(z, gate, identity, self.activation)


class InferenceNetwork(nn.Module):
    """Images in any floating dtype and layout → float32 logits, without gradients.

    `network` is the rebuilt one, with the original's attributes (arch, num_classes, …).
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
def _frozen_weights():
    """What is compiled inside takes the weights for constants, and lays them out to suit.

    torch.compile's own option comes too late: what is an input and what a constant is decided while
    the graph is captured, before options count.
    """
    import torch._inductor.config  # takes seconds, and most have nothing to compile

    return torch._inductor.config.patch(freezing=True)


class _PixelMean(nn.Module):
    """Mean over the pixels, (N, C, H, W) → (N, C, 1, 1): adaptive pooling exports as 11 nodes."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3), keepdim=True)


def _rebuilt_resnet_block(block: BasicBlock | Bottleneck) -> InferenceBlock:
    body = nn.Sequential(_folded(block.conv1, block.bn1, "relu"))
    if isinstance(block, Bottleneck):
        body.append(_folded(block.conv2, block.bn2, "relu"))
        last = _folded(block.conv3, block.bn3)
    else:
        last = _folded(block.conv2, block.bn2)
    shortcut = nn.Identity() if block.downsample is None else _folded(*block.downsample)
    attention = getattr(block, block.slot) if block.slot else None
    return InferenceBlock(body, last, attention, shortcut, activation=True)


def _rebuilt_conv_bn_relu(block: ConvBNReLU) -> nn.Module:
    conv, bn, activation = block
    if type(activation) is nn.ReLU6:
        return _folded(conv, bn, "relu6")
    return nn.Sequential(_folded(conv, bn), activation)


def _rebuilt_inverted_residual(block: InvertedResidual) -> InferenceBlock:
    *body, conv, bn, attention = block.conv if block.attends else (*block.conv, None)
    body = nn.Sequential(*[_rebuilt_conv_bn_relu(part) for part in body])
    shortcut = nn.Identity() if block.residual else None
    return InferenceBlock(body, _folded(conv, bn), attention, shortcut, activation=False)


def _rebuild(network: ResNet | MobileNetV2) -> None:
    if isinstance(network, ResNet):
        network.conv1 = _folded(network.conv1, network.bn1, "relu")
        network.bn1 = network.relu = nn.Identity()
        network.avgpool = _PixelMean()
        stages = [network.layer1, network.layer2, network.layer3, network.layer4]
    else:
        stages = [network.features]
    rebuilders = {
        BasicBlock: _rebuilt_resnet_block,
        Bottleneck: _rebuilt_resnet_block,
        ConvBNReLU: _rebuilt_conv_bn_relu,
        InvertedResidual: _rebuilt_inverted_residual,
    }
    for stage in stages:
        for i, block in enumerate(stage):
            if type(block) not in rebuilders:  # a subclass may compute something else
                raise ValueError(f"a block of type {type(block).__name__} cannot be rebuilt")
            stage[i] = rebuilders[type(block)](block)


def optimise_for_inference(
    model: nn.Module, dtype: torch.dtype | None = None, compile: bool = False
) -> InferenceNetwork:
    """A new network that computes what `model` does in eval mode, faster; `model` stays as it is.

    Args:
        model: a ResNet or MobileNetV2 of this package, on the device it is to run on.
        dtype: of weights and activations; None for `fastest_dtype` of that device.
        compile: also through torch.compile with the weights frozen. The first call takes a minute
            or so, and so does the first with another batch or image size; on CPU it needs a C++
            compiler.

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
    device = next(model.parameters()).device
    if dtype is None:
        dtype = fastest_dtype(device)
    network = copy.deepcopy(model).eval().requires_grad_(False)
    _rebuild(network)
    network.to(dtype=dtype, memory_format=torch.channels_last)
    if device.type == "cpu" and not compile:
        for module in network.modules():
            if isinstance(module, PackedConv2d):
                module.agrees()  # the trial belongs here, not into the first call
    return InferenceNetwork(network, dtype, compile).eval()
