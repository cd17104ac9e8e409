"""A convolution for inference on a CPU: it packs its weights once and computes the activation too.

oneDNN computes PyTorch's convolutions on a CPU, and needs the weights in a layout of its own.
`nn.Conv2d` converts them at every call, which at batch 1 takes a third of a ResNet's time.
`PackedConv2d` converts them once for each shape of the input. The best layout depends on that
shape: the layout for another shape can be fifty times slower.

It computes an ordinary convolution and then the activation where oneDNN's operators are missing or
compute something else, and for calls that they do not support: on another device, with gradients,
under torch.compile or torch.export.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

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
            found, expected = self._by_onednn(x, self._pack(x.shape)), self._plain(x)
        except (RuntimeError, AttributeError, TypeError):
            return (
                False  # this build or processor lacks the operators, or they take other arguments
            )
        if found.shape != expected.shape or found.dtype != expected.dtype:
            return False
        allowed = TOLERANCE[weight.dtype] * expected.abs().max()
        return bool((found - expected).abs().max() <= allowed)

    def _apply(self, *args: Any, **kwargs: Any) -> "PackedConv2d":
        self._agrees = self._packed = None  # the parameters move or change their dtype
        return super()._apply(*args, **kwargs)  # type: ignore[no-untyped-call]

    def __getstate__(self) -> dict:
        return {k: v for k, v in self.__dict__.items() if k != "_packed"}  # it cannot be copied
