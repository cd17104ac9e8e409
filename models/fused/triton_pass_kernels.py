"""The Triton kernels of the fused tail that read or write (N, C, H, W) tensors.

They compute in float32 what `Whole` computes, one kernel for each of its passes. A program takes a
block of channels of one sample. Where the batch is small, a reduction over the pixels is split
among programs: each writes its part, and a kernel of `triton_channel_kernels` adds the parts in a
fixed order. So there are no atomics, and the same input gives the same bits.
"""

import triton
import triton.language as tl


@triton.jit
def _offsets(i, channel, pixel, c, hw, NHWC: tl.constexpr):
    """Offsets of the elements (sample i, channel, pixel) in memory: a tile of pixels × channels."""
    sample = i.to(tl.int64) * c * hw
    if NHWC:
        return sample + pixel[:, None] * c + channel[None, :]
    return sample + channel[None, :] * hw + pixel[:, None]


@triton.jit
def _sizes(c, hw, NHWC: tl.constexpr, VEC: tl.constexpr):
    """Returns c and hw unchanged, but so that the compiler sees that VEC divides a line of memory.

    VEC elements are what a thread may load at a time. By itself the compiler sees only whether 16
    divides a number.
    """
    if NHWC:
        return c // VEC * VEC, hw
    return c, hw // VEC * VEC


@triton.jit
def moments(
    z,
    part_mean,
    part_m2,
    c,
    hw,
    per,
    SQUARES: tl.constexpr,
    NHWC: tl.constexpr,
    VEC: tl.constexpr,
    BC: tl.constexpr,
    BP: tl.constexpr,
):
    """Mean, and if SQUARES Σ of squared deviations, over `per` pixels: (splits, N, C) each.

    Sums are of deviations from the first tile's mean. It is at most √(pixels/tile) standard
    deviations away from the mean of all, for any values, so few digits cancel. Sums over threads
    are taken after the loop alone.
    """
    c, hw = _sizes(c, hw, NHWC, VEC)
    i, split = tl.program_id(0), tl.program_id(2)
    channel = tl.program_id(1) * BC + tl.arange(0, BC)
    known = (channel < c)[None, :]
    first = split * per
    stop = tl.minimum(first + per, hw)
    pixel = first + tl.arange(0, BP)
    inside = (pixel < hw)[:, None] & known
    x = tl.load(z + _offsets(i, channel, pixel, c, hw, NHWC), inside, 0.0).to(tl.float32)
    about = tl.sum(x, 0) / tl.minimum(stop - first, BP)
    sums = tl.where(inside, x - about[None, :], 0.0)
    squares = sums * sums
    for start in range(first + BP, stop, BP):
        pixel = start + tl.arange(0, BP)
        inside = (pixel < hw)[:, None] & known
        x = tl.load(z + _offsets(i, channel, pixel, c, hw, NHWC), inside, 0.0).to(tl.float32)
        deviation = tl.where(inside, x - about[None, :], 0.0)
        sums += deviation
        squares += deviation * deviation
    shift = tl.sum(sums, 0) / (stop - first)
    to = (split * tl.num_programs(0) + i) * c + channel
    tl.store(part_mean + to, about + shift, channel < c)
    if SQUARES:
        m2 = tl.sum(squares, 0) - shift * shift * (stop - first)
        tl.store(part_m2 + to, tl.where(m2 < 0, 0.0, m2), channel < c)  # NaN stays


@triton.jit
def apply(
    z,
    mean,
    inverse_std,
    weight,
    bias,
    gate,
    residual,
    out,
    c,
    hw,
    per,
    ECA: tl.constexpr,
    RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr,
    NHWC: tl.constexpr,
    VEC: tl.constexpr,
    BC: tl.constexpr,
    BP: tl.constexpr,
):
    """out = act(BN(z) · gate + residual)."""
    c, hw = _sizes(c, hw, NHWC, VEC)
    i = tl.program_id(0)
    channel = tl.program_id(1) * BC + tl.arange(0, BC)
    known = channel < c
    centre = tl.load(mean + channel, known, 0.0)
    scale = tl.load(weight + channel, known, 0.0) * tl.load(inverse_std + channel, known, 0.0)
    shift = tl.load(bias + channel, known, 0.0)
    if ECA:
        s = tl.load(gate + i * c + channel, known, 0.0)
        scale, shift = scale * s, shift * s
    first = tl.program_id(2) * per
    for start in range(first, tl.minimum(first + per, hw), BP):
        pixel = start + tl.arange(0, BP)
        inside = (pixel < hw)[:, None] & known[None, :]
        at = _offsets(i, channel, pixel, c, hw, NHWC)
        y = tl.load(z + at, inside, 0.0).to(tl.float32) - centre[None, :]
        y = y * scale[None, :] + shift[None, :]
        if RESIDUAL:
            y += tl.load(residual + at, inside, 0.0).to(tl.float32)
        if ACTIVATION:
            y = tl.where(y < 0, 0.0, y)  # NaN stays
        tl.store(out + at, y, inside)


@triton.jit
def gradient_sums(
    grad,
    out,
    z,
    mean,
    part_d,
    part_dz,
    dr,
    c,
    hw,
    per,
    ACTIVATION: tl.constexpr,
    KEEP: tl.constexpr,
    NHWC: tl.constexpr,
    VEC: tl.constexpr,
    BC: tl.constexpr,
    BP: tl.constexpr,
):
    """Σd and Σd·(z - mean) over `per` pixels: (splits, N, C) each; if KEEP, d itself."""
    c, hw = _sizes(c, hw, NHWC, VEC)
    i, split = tl.program_id(0), tl.program_id(2)
    channel = tl.program_id(1) * BC + tl.arange(0, BC)
    known = channel < c
    centre = tl.load(mean + channel, known, 0.0)
    sum_d = tl.zeros([BP, BC], tl.float32)
    sum_dz = tl.zeros([BP, BC], tl.float32)
    first = split * per
    for start in range(first, tl.minimum(first + per, hw), BP):
        pixel = start + tl.arange(0, BP)
        inside = (pixel < hw)[:, None] & known[None, :]
        at = _offsets(i, channel, pixel, c, hw, NHWC)
        d = tl.load(grad + at, inside, 0.0).to(tl.float32)
        if ACTIVATION:
            d = tl.where(tl.load(out + at, inside, 1.0) <= 0, 0.0, d)
        x = tl.load(z + at, inside, 0.0).to(tl.float32) - centre[None, :]
        if KEEP:  # after the loads, which do not wait then
            tl.store(dr + at, d, inside)
        sum_d += d
        sum_dz += d * x
    to = (split * tl.num_programs(0) + i) * c + channel
    tl.store(part_d + to, tl.sum(sum_d, 0), known)
    tl.store(part_dz + to, tl.sum(sum_dz, 0), known)


@triton.jit
def gradient_input(
    grad,
    out,
    z,
    mean,
    inverse_std,
    weight,
    gate,
    d_pooled,
    d_weight,
    d_bias,
    dz,
    n,
    c,
    hw,
    per,
    BATCH: tl.constexpr,
    ECA: tl.constexpr,
    ACTIVATION: tl.constexpr,
    NHWC: tl.constexpr,
    VEC: tl.constexpr,
    BC: tl.constexpr,
    BP: tl.constexpr,
):
    """∂z = a·s·d + a·∂pooled/HW - a·∂bias/M - a·∂weight/(M·σ)·(z - mean)."""
    c, hw = _sizes(c, hw, NHWC, VEC)
    i = tl.program_id(0)
    channel = tl.program_id(1) * BC + tl.arange(0, BC)
    known = channel < c
    slope = tl.load(inverse_std + channel, known, 0.0)
    a = tl.load(weight + channel, known, 0.0) * slope
    centre = tl.load(mean + channel, known, 0.0)
    on_grad = a
    on_z = tl.zeros([BC], tl.float32)
    constant = tl.zeros([BC], tl.float32)
    if ECA:
        on_grad = a * tl.load(gate + i * c + channel, known, 0.0)
        constant += a * tl.load(d_pooled + i * c + channel, known, 0.0) / hw
    if BATCH:
        count = 1.0 * n * hw  # n may be a constant: the JIT makes one of an argument that is 1
        constant -= a * tl.load(d_bias + channel, known, 0.0) / count
        on_z -= a * slope * tl.load(d_weight + channel, known, 0.0) / count
    first = tl.program_id(2) * per
    for start in range(first, tl.minimum(first + per, hw), BP):
        pixel = start + tl.arange(0, BP)
        inside = (pixel < hw)[:, None] & known[None, :]
        at = _offsets(i, channel, pixel, c, hw, NHWC)
        d = tl.load(grad + at, inside, 0.0).to(tl.float32)
        if ACTIVATION:
            d = tl.where(tl.load(out + at, inside, 1.0) <= 0, 0.0, d)
        x = d * on_grad[None, :] + constant[None, :]
        if BATCH:
            centred = tl.load(z + at, inside, 0.0).to(tl.float32) - centre[None, :]
            x += centred * on_z[None, :]
        tl.store(dz + at, x, inside)
