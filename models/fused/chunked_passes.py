"""The fused tail's passes in PyTorch's operations for an eager CPU: a few samples at a time.

They serve where the compiled passes are missing. Operations work in place on one chunk of the batch
after the other. So all but the first and the last find the chunk in the cache, and half precision
is converted to float32 once per chunk.
"""

import torch
from torch import Tensor

from .whole_passes import accumulation_dtype, over_pixels

CHUNK_BYTES = 2 << 20  # per thread; measured, flat between 1 and 4 MiB


class Chunks:
    """The slices of a batch, and buffers for a slice in the accumulation dtype."""

    def __init__(self, z: Tensor):
        n, c, h, w = z.shape
        self.dtype = accumulation_dtype(z.dtype)
        budget = CHUNK_BYTES * torch.get_num_threads()
        self.size = max(1, min(n, budget // (c * h * w * self.dtype.itemsize)))
        self.slices = [slice(i, min(i + self.size, n)) for i in range(0, n, self.size)]
        self.like = z[: self.size]

    def buffer(self) -> Tensor:
        return torch.empty_like(self.like, dtype=self.dtype)

    def widen(self, x: Tensor, buffer: Tensor) -> Tensor:
        """Returns x if it has the accumulation dtype, otherwise its copy in the buffer."""
        return x if x.dtype == self.dtype else buffer[: len(x)].copy_(x)


def _part(small: Tensor, s: slice) -> Tensor:
    """Returns the chunk's rows of (N, C, 1, 1); (1, C, 1, 1) is for all chunks."""
    return small if len(small) == 1 else small[s]


def _affine(x: Tensor, scale: Tensor, shift: Tensor | None, out: Tensor) -> None:
    """Computes x · scale + shift into out. addcmul is fast in channels_last alone: vectorised."""
    if shift is not None and x.stride(1) == 1:
        torch.addcmul(shift, x, scale, out=out)
    else:
        torch.mul(x, scale, out=out)
        if shift is not None:
            out.add_(shift)


class Chunked:
    """Passes that take a few samples at a time, in place."""

    @staticmethod
    def means(z: Tensor) -> Tensor:
        chunks = Chunks(z)
        buffer = chunks.buffer() if z.dtype != chunks.dtype else z
        means = z.new_empty(z.shape[:2], dtype=chunks.dtype)
        for s in chunks.slices:
            torch.mean(chunks.widen(z[s], buffer), (2, 3), out=means[s])
        return means

    @staticmethod
    def moments(z: Tensor, per_sample: bool) -> tuple[Tensor | None, Tensor, Tensor]:
        if z.stride(1) == 1 and z.is_contiguous(memory_format=torch.channels_last):
            return Chunked._moments_channels_last(z, per_sample)
        chunks = Chunks(z)
        buffer = chunks.buffer()
        means = z.new_empty(z.shape[:2], dtype=chunks.dtype)
        squares = torch.empty_like(means)
        for s in chunks.slices:
            x = chunks.widen(z[s], buffer)
            torch.mean(x, (2, 3), out=means[s])
            centred = torch.sub(x, over_pixels(means[s]), out=buffer[: len(x)])
            torch.sum(centred.mul_(centred), (2, 3), out=squares[s])
        mean = means.mean(0)
        within = squares.mean(0) / (z.shape[2] * z.shape[3])
        return means if per_sample else None, mean, within + (means - mean).square().mean(0)

    @staticmethod
    def _moments_channels_last(z: Tensor, per_sample: bool) -> tuple[Tensor | None, Tensor, Tensor]:
        # BatchNorm's own two-pass statistics are quick in this format, reductions to (N, C) less.
        chunks = Chunks(z)
        buffer = chunks.buffer() if z.dtype != chunks.dtype else z
        means = z.new_empty(z.shape[:2], dtype=chunks.dtype) if per_sample else None
        statistics = []
        for s in chunks.slices:
            x = chunks.widen(z[s], buffer)
            if means is not None:
                torch.mean(x, (2, 3), out=means[s])
            statistics.append(torch.batch_norm_update_stats(x, None, None, 0.0))
        mean_of, variance_of = (torch.stack(t) for t in zip(*statistics, strict=True))
        share = mean_of.new_tensor([[(s.stop - s.start) / len(z)] for s in chunks.slices])
        # The rows of `means` are summed pairwise, so they are the better source where both exist.
        mean = means.mean(0) if means is not None else (share * mean_of).sum(0)
        return means, mean, (share * (variance_of + (mean_of - mean).square())).sum(0)

    @staticmethod
    def scale_and_add(
        z: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None, activation: bool
    ) -> Tensor:
        chunks = Chunks(z)
        narrow = z.dtype != chunks.dtype
        buffer = chunks.buffer() if narrow else z
        out = torch.empty_like(z)
        scale, shift = over_pixels(scale), over_pixels(shift)
        for s in chunks.slices:
            x = chunks.widen(z[s], buffer)
            y = x if narrow else out[s]
            _affine(x, _part(scale, s), _part(shift, s), y)
            if residual is not None:
                y.add_(residual[s])
            if activation:
                y.relu_()
            if narrow:
                out[s].copy_(y)
        return out

    @staticmethod
    def gradient_sums(
        grad: Tensor, out: Tensor | None, z: Tensor, mean: Tensor, keep: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        chunks = Chunks(z)
        d = grad if out is None or not keep else torch.empty_like(z)
        scratch = None if out is None or keep else torch.empty_like(chunks.like)
        sum_d = z.new_empty(z.shape[:2], dtype=chunks.dtype)
        sum_dz = torch.empty_like(sum_d)
        for s in chunks.slices:
            part = grad[s]
            if out is not None:
                part = _mask(part, out[s], d[s] if scratch is None else scratch)
            _sums_of_products(part, z[s], mean, sum_d[s], sum_dz[s])
        return d, sum_d, sum_dz

    @staticmethod
    def gradient_input(
        grad: Tensor,
        out: Tensor | None,
        z: Tensor,
        on_grad: Tensor,
        on_z: Tensor | None,
        constant: Tensor | None,
    ) -> Tensor:
        chunks = Chunks(z)
        narrow = z.dtype != chunks.dtype
        scratch = grad if out is None else torch.empty_like(chunks.like)
        buffer_z = chunks.buffer() if narrow else z
        buffer_d = chunks.buffer() if narrow else grad
        dz = torch.empty_like(z)
        on_grad = over_pixels(on_grad)
        on_z, constant = (None if t is None else over_pixels(t) for t in (on_z, constant))
        for s in chunks.slices:
            part = grad[s] if out is None else _mask(grad[s], out[s], scratch)
            wide = chunks.widen(part, buffer_d)
            add = None if constant is None else _part(constant, s)
            if on_z is None:
                y = wide if narrow else dz[s]
                _affine(wide, _part(on_grad, s), add, y)
            else:
                x = chunks.widen(z[s], buffer_z)
                y = x if narrow else dz[s]
                _affine(x, _part(on_z, s), add, y)
                y.addcmul_(wide, _part(on_grad, s))
            if narrow:
                dz[s].copy_(y)
        return dz


def _sums_of_products(d: Tensor, z: Tensor, mean: Tensor, sum_d: Tensor, sum_dz: Tensor) -> None:
    """Computes Σd and Σd·(z - mean) over the pixels, into (N, C).

    For σ = 1 they are the gradients of BatchNorm's bias and weight, which its backward computes per
    channel, in one loop over both tensors. So each (sample, channel) pair becomes a channel of one
    large sample. In channels_last that would need a copy; there each sample becomes a batch.
    """
    n, c, h, w = z.shape
    if z.is_contiguous():
        mean, shape = mean.repeat(n), (1, n * c, h, w)
        pairs = [(d.view(shape), z.view(shape), sum_d.view(-1), sum_dz.view(-1))]
    else:
        pairs = [(d[i : i + 1], z[i : i + 1], sum_d[i], sum_dz[i]) for i in range(n)]
    ones = torch.ones_like(mean)
    for d_part, z_part, to_d, to_dz in pairs:
        _, found_dz, found_d = torch.ops.aten.native_batch_norm_backward(
            d_part, z_part, None, None, None, mean, ones, True, 0.0, [False, True, True]
        )
        to_d.copy_(found_d)
        to_dz.copy_(found_dz)


def _mask(grad: Tensor, out: Tensor, into: Tensor) -> Tensor:
    """Returns grad where out > 0, otherwise 0."""
    into = into[: len(grad)]
    return torch.ops.aten.threshold_backward.grad_input(grad, out, 0, grad_input=into)
