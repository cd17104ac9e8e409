"""Rebuilds a network for inference: it computes the same with fewer passes over its activations.

BatchNorm is folded into the convolutions, ReLU is computed with them, activations have the
channels_last layout, and on a CPU the weights are packed once.

Where a block's last convolution is 1×1 and has more outputs than inputs, ECA's gate is computed
from its input h. Pooling is linear, so GAP(W h + b) = W GAP(h) + b, and a bottleneck's h is four
times smaller than W h. ECA's convolution along the channels is linear as well: a matrix K with k
diagonals. So the gate is sigmoid(K W GAP(h) + K b), one small product with K W known beforehand.
The scaling by the gate, the addition and ReLU are then one pass over the convolution's output.

oneDNN computes PyTorch's convolutions on a CPU, and needs the weights in a layout of its own.
`nn.Conv2d` converts them at every call, which at batch 1 takes a third of a ResNet's time.
`PackedConv2d` converts them once for each shape of the input. The best layout depends on that
shape: the layout for another shape can be fifty times slower. It computes an ordinary convolution
and then the activation where oneDNN's operators are missing or compute something else, and for
calls that they do not support: on another device, with gradients, under torch.compile or
torch.export.
"""

import copy
import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

from .eca_mobilenetv2 import ConvBNReLU, InvertedResidual, MobileNetV2
from .eca_module import ECALayer
from .eca_resnet import BasicBlock, Bottleneck, ResNet
from .fused.cpu_passes import finish_in_place, pixel_means
from .fused.formulas import along_channels
from .fused.proof import has_hooks, is_bare, is_eca, remember

ACTIVATIONS: dict[str | None, tuple[str, list[float]]] = {
    # name: oneDNN's name and its numbers
    None: ("none", []),
    "relu": ("relu", []),
    "relu6": ("hardtanh", [0.0, 6.0]),
}
_Pair = tuple[int, int]  # what torch's convolutions keep, though it says tuple[int, ...]
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}  # relative to the largest output


class PackedConv2d(nn.Conv2d):
    """Computes activation(conv2d(x)); the parameters are those of nn.Conv2d, and may be changed.

    state_dict, copies and pickles do not hold the packed weights. The next call packs again, and so
    does a call after the weights, the input's shape or the number of threads have changed.

    Attributes:
        activation: None, "relu" or "relu6".
    """

    activation: str | None = None
    _agrees: bool | None = None  # whether oneDNN's operators compute the same; None: not yet tried
    _packed: tuple[tuple, Tensor] | None = None  # what the packed weights are for, and they

    @classmethod
    def of(cls, conv: nn.Conv2d, activation: str | None = None) -> "PackedConv2d":
        """Builds a layer that has the parameters of `conv`: the same tensors.

        Raises:
            ValueError: the activation is not a key of `ACTIVATIONS`.
        """
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation {activation!r} is not one of {list(ACTIVATIONS)}")
        with torch.device("meta"):
            new = cls(
                conv.in_channels,
                conv.out_channels,
                cast(_Pair, conv.kernel_size),
                cast(_Pair, conv.stride),
                cast(_Pair | str, conv.padding),
                cast(_Pair, conv.dilation),
                conv.groups,
                conv.bias is not None,
                conv.padding_mode,
            )
        new.weight, new.bias, new.activation = conv.weight, conv.bias, activation
        return new

    def forward(self, x: Tensor) -> Tensor:
        packed = self._packed_for(x)
        if packed is None:
            return self._plain(x)
        return self._by_onednn(x, packed)

    def extra_repr(self) -> str:
        after = f", activation={self.activation}" if self.activation else ""
        return super().extra_repr() + after  # type: ignore[no-untyped-call]

    def _plain(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        if self.activation is None:
            return y
        return F.relu_(y) if self.activation == "relu" else F.relu6(y, inplace=True)

    def _by_onednn(self, x: Tensor, packed: Tensor) -> Tensor:
        name, numbers = ACTIVATIONS[self.activation]
        return torch.ops.mkldnn._convolution_pointwise.default(
            x,
            packed,
            self.bias,
            self.padding,
            self.stride,
            self.dilation,
            self.groups,
            name,
            numbers,
            "",
        )

    def _packed_for(self, x: Tensor) -> Tensor | None:
        """Returns the packed weights, or None if this call cannot use them."""
        if (
            torch.compiler.is_compiling()
            or torch.is_grad_enabled()
            or x.device.type != "cpu"
            or x.dtype != self.weight.dtype
            or x.dim() != 4
            or not x.numel()
            or not torch.backends.mkldnn.enabled
            or not self.agrees()
        ):
            return None
        weight = self.weight
        # An inference tensor counts no changes; only its place tells it from another.
        version = None if weight.is_inference() else weight._version
        key = (x.shape, torch.get_num_threads(), weight.data_ptr(), version)
        if self._packed is None or self._packed[0] != key:
            self._packed = None  # frees it before the next is made
            self._packed = key, self._pack(x.shape)
        return self._packed[1]

    def _pack(self, shape: torch.Size) -> Tensor:
        return torch.ops.mkldnn._reorder_convolution_weight.default(
            self.weight.detach(),
            self.padding,
            self.stride,
            self.dilation,
            self.groups,
            list(shape),
        )

    def agrees(self) -> bool:
        """Tells whether oneDNN's operators compute the same; tries it on a small image, once."""
        if self._agrees is None:
            self._agrees = self._try_small_image()
        return self._agrees

    @torch.no_grad()
    def _try_small_image(self) -> bool:
        weight = self.weight
        supported = weight.device.type == "cpu" and weight.dtype in TOLERANCE
        if not supported or self.padding_mode != "zeros" or isinstance(self.padding, str):
            return False
        reach = [d * (k - 1) for d, k in zip(self.dilation, self.kernel_size, strict=True)]
        size = [r + s + 1 for r, s in zip(reach, self.stride, strict=True)]
        chance = torch.Generator().manual_seed(0)
        x = torch.randn(1, self.in_channels, *size, generator=chance).to(weight.dtype)
        x = x.contiguous(memory_format=torch.channels_last)
        try:
            result, expected = self._by_onednn(x, self._pack(x.shape)), self._plain(x)
        except (RuntimeError, AttributeError, TypeError):  # no such operators, or other arguments
            return False
        if result.shape != expected.shape or result.dtype != expected.dtype:
            return False
        allowed = TOLERANCE[weight.dtype] * expected.abs().max()
        return bool((result - expected).abs().max() <= allowed)

    def _apply(self, *args: Any, **kwargs: Any) -> "PackedConv2d":
        self._agrees = self._packed = None  # the parameters move or change their dtype
        return super()._apply(*args, **kwargs)  # type: ignore[no-untyped-call]

    def __getstate__(self) -> dict:
        return {k: v for k, v in self.__dict__.items() if k != "_packed"}  # it cannot be copied


def folded(conv: nn.Conv2d, bn: nn.BatchNorm2d, activation: str | None = None) -> PackedConv2d:
    """Builds a convolution that computes activation(bn(conv(x))) with bn's running statistics."""
    if not (is_bare(bn, nn.BatchNorm2d) or is_bare(bn, nn.SyncBatchNorm)):
        raise ValueError(f"{type(bn).__name__} cannot be folded into a convolution as BatchNorm")
    if bn.running_mean is None:
        raise ValueError("BatchNorm without running statistics cannot be folded: train with them")
    wide = fuse_conv_bn_eval(copy.deepcopy(conv).double(), copy.deepcopy(bn).double())
    return PackedConv2d.of(wide.to(conv.weight.dtype), activation)


WIDEST_GATE_MATRIX = 512  # channels; beyond, a full matrix costs more than its k diagonals


def _gate_of(attention: ECALayer, last: nn.Conv2d, from_input: bool) -> nn.Conv2d:
    """Builds ECA's convolution as a 1×1 convolution of pooled values, before the sigmoid.

    Args:
        from_input: the pooled values are the input of `last`, a 1×1 convolution whose weights then
            belong to the product; otherwise they are its output.
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
    """Computes act(attention(last(body(x))) + shortcut(x)).

    attention, shortcut and the activation can each be left out.

    Args:
        body: everything before the last convolution.
        last: the last convolution, BatchNorm folded in.
        attention: an ECALayer, whose gate this class computes; another attention; or None.
        shortcut: a module, nn.Identity for x itself; or None for no addition.
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
        self.gated = is_eca(attention)  # a layer that was changed is called as it is
        # An inverted residual's h is the larger one.
        pointwise = last.kernel_size == last.stride == (1, 1) and last.groups == 1
        self.gate_first = pointwise and last.in_channels < last.out_channels
        self.gate: nn.Conv2d | None = None
        if is_eca(attention) and (self.gate_first or last.out_channels <= WIDEST_GATE_MATRIX):
            self.gate = _gate_of(attention, last, self.gate_first)

    def _pools_input(self, h: Tensor, z: Tensor) -> bool:
        """Tells whether the gate from h reads less memory than the gate from z.

        It reads h and the gate's weights. At batch 1 and 7×7 pixels the weights alone are larger
        than z. An exported graph is for all sizes, so there the kind of convolution decides.
        """
        if self.gate is None or not self.gate_first or torch.compiler.is_exporting():
            return self.gate_first
        return h.numel() + self.gate.weight.numel() < z.numel()

    def _gate(self, h: Tensor, z: Tensor) -> Tensor:
        """Computes ECA's gate (N, C) from the last convolution's input h or output z."""
        # A branch, not a comparison: where torch.compile has seen several sizes, this is a symbol.
        x, folded = (h, self.gate_first) if self._pools_input(h, z) else (z, not self.gate_first)
        if self.gate is not None and folded:
            weight, bias = self.gate.weight.flatten(1), self.gate.bias
            pooled = pixel_means(x)
            return F.linear(pooled.to(weight.dtype), weight, bias).to(pooled.dtype).sigmoid()
        pooled = pixel_means(x)
        kernel = cast(ECALayer, self.attention).conv.weight.flatten().to(pooled.dtype)
        return along_channels(pooled, kernel).sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        h = self.body(x)
        z = self.last(h)
        identity = None if self.shortcut is None else self.shortcut(x)
        gate = None
        if self.gated and self.gate is not None and torch.compiler.is_exporting():
            # As SE computes its gate, in operations that inference engines fuse.
            pooled = (h if self.gate_first else z).mean((2, 3), keepdim=True)
            z = z * self.gate(pooled).sigmoid()
        elif self.gated:
            gate = self._gate(h, z)
        elif self.attention is not None:
            z = self.attention(z)
        return finish_in_place(z, gate, identity, self.activation)


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
            f" create_model('eca_resnet50'), not {getattr(model, 'arch', type(model).__name__)}"
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
