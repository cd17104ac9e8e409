"""The parts of a network rebuilt for inference: folded convolutions, and blocks with ECA's gate."""

import copy
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

from .eca_module import ECALayer
from .fused.formulas import along_channels
from .fused.passes import finish_in_place, pixel_means
from .fused.stock_modules import is_bare, is_eca
from .packed_convolution import PackedConv2d


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

    def _gate_for_export(self, gate: nn.Conv2d, h: Tensor, z: Tensor) -> Tensor:
        """Computes the gate (N, C, 1, 1) as SE does, in operations that inference engines fuse."""
        return gate((h if self.gate_first else z).mean((2, 3), keepdim=True)).sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        h = self.body(x)
        z = self.last(h)
        identity = None if self.shortcut is None else self.shortcut(x)
        gate = None
        if self.gated and self.gate is not None and torch.compiler.is_exporting():
            z = z * self._gate_for_export(self.gate, h, z)
        elif self.gated:
            gate = self._gate(h, z)
        elif self.attention is not None:
            z = self.attention(z)
        return finish_in_place(z, gate, identity, self.activation)
