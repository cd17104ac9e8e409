"""The fused tail's passes, each written as one expression on the whole tensor.

torch.compile turns each expression into one loop. `passes` chooses this form, and describes the
arguments of a pass.
"""

import torch
from torch import Tensor


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def over_pixels(small: Tensor) -> Tensor:
    """(N or 1, C) → (N or 1, C, 1, 1)."""
    return small[:, :, None, None]


class Whole:
    """Passes that are one expression each; the other forms compute the same."""

    @staticmethod
    def means(z: Tensor) -> Tensor:
        """Computes the means over the pixels: (N, C)."""
        return z.mean((2, 3), dtype=accumulation_dtype(z.dtype))

    @staticmethod
    def moments(z: Tensor, per_sample: bool) -> tuple[Tensor | None, Tensor, Tensor]:
        """Computes the means (N, C), or None; the mean (C,); and the biased variance (C,)."""
        x = z.to(accumulation_dtype(z.dtype))
        means = x.mean((2, 3))
        mean = means.mean(0)
        variance = (x - mean[:, None, None]).square().mean((0, 2, 3))
        return means if per_sample else None, mean, variance

    @staticmethod
    def scale_and_add(
        z: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None, activation: bool
    ) -> Tensor:
        """Computes act(z · scale + shift + residual)."""
        y = z.to(scale.dtype) * over_pixels(scale) + over_pixels(shift)
        if residual is not None:
            y = y + residual
        return (y.relu() if activation else y).to(z.dtype)

    @staticmethod
    def gradient_sums(
        grad: Tensor, out: Tensor | None, z: Tensor, mean: Tensor, keep: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Computes d, which is grad where out > 0, and Σd and Σd·(z - mean), both (N, C).

        Without out, d is grad. Unless `keep` is set, the first result may be grad instead of d.
        """
        d = grad if out is None else torch.ops.aten.threshold_backward(grad, out, 0)
        wide = d.to(mean.dtype)
        sum_d = wide.sum((2, 3))
        sum_dz = (wide * (z.to(mean.dtype) - mean[:, None, None])).sum((2, 3))
        return (d if keep else grad), sum_d, sum_dz

    @staticmethod
    def gradient_input(
        grad: Tensor,
        out: Tensor | None,
        z: Tensor,
        on_grad: Tensor,
        on_z: Tensor | None,
        constant: Tensor | None,
    ) -> Tensor:
        """Computes ∂z = on_grad · d + on_z · z + constant, with d as above; None is zero."""
        d = grad if out is None else torch.ops.aten.threshold_backward(grad, out, 0)
        dz = d.to(on_grad.dtype) * over_pixels(on_grad)
        if on_z is not None:
            dz = dz + z.to(on_grad.dtype) * over_pixels(on_z)
        if constant is not None:
            dz = dz + over_pixels(constant)
        return dz.to(z.dtype)
