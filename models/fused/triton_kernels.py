"""The Triton kernels of the fused tail.

They compute in float32 what `formulas` computes. First those that read or write
(N, C, H, W) tensors, one for each pass. A program takes a block of channels of one sample. Where
the batch is small, a reduction over the pixels is split among programs: each writes its part. Then
those that work on (N, C) tensors alone: they add the parts in a fixed order, and compute
statistics, the gate, and the gradients of both. So there are no atomics, and the same input gives
the same bits.
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
def _part(c, BC: tl.constexpr):
    """Returns this program's part: the sample and its channels; and the number of samples.

    Programs that run together share a sample: blocks of its channels lie side by side in memory.
    """
    blocks = tl.cdiv(c, BC)
    i = tl.program_id(0) // blocks
    channel = tl.program_id(0) % blocks * BC + tl.arange(0, BC)
    return i, channel, tl.num_programs(0) // blocks


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
    i, channel, n = _part(c, BC)
    split = tl.program_id(1)
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
    to = (split * n + i) * c + channel
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
    ceiling,
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
    """out = act(BN(z) · gate + residual). A ceiling that is NaN stands for none."""
    c, hw = _sizes(c, hw, NHWC, VEC)
    i, channel, _ = _part(c, BC)
    known = channel < c
    centre = tl.load(mean + channel, known, 0.0)
    scale = tl.load(weight + channel, known, 0.0) * tl.load(inverse_std + channel, known, 0.0)
    shift = tl.load(bias + channel, known, 0.0)
    if ECA:
        s = tl.load(gate + i * c + channel, known, 0.0)
        scale, shift = scale * s, shift * s
    first = tl.program_id(1) * per
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
            y = tl.where(y > ceiling, ceiling, y)
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
    ceiling,
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
    i, channel, n = _part(c, BC)
    split = tl.program_id(1)
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
            y = tl.load(out + at, inside, 1.0).to(tl.float32)
            d = tl.where((y <= 0) | (y >= ceiling), 0.0, d)
        x = tl.load(z + at, inside, 0.0).to(tl.float32) - centre[None, :]
        if KEEP:  # after the loads, which do not wait then
            tl.store(dr + at, d, inside)
        sum_d += d
        sum_dz += d * x
    to = (split * n + i) * c + channel
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
    ceiling,
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
    i, channel, _ = _part(c, BC)
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
    first = tl.program_id(1) * per
    for start in range(first, tl.minimum(first + per, hw), BP):
        pixel = start + tl.arange(0, BP)
        inside = (pixel < hw)[:, None] & known[None, :]
        at = _offsets(i, channel, pixel, c, hw, NHWC)
        d = tl.load(grad + at, inside, 0.0).to(tl.float32)
        if ACTIVATION:
            y = tl.load(out + at, inside, 1.0).to(tl.float32)
            d = tl.where((y <= 0) | (y >= ceiling), 0.0, d)
        x = d * on_grad[None, :] + constant[None, :]
        if BATCH:
            centred = tl.load(z + at, inside, 0.0).to(tl.float32) - centre[None, :]
            x += centred * on_z[None, :]
        tl.store(dz + at, x, inside)


@triton.jit
def _merged(
    part_mean, part_m2, row, channel, n, c, hw, per, splits, BN: tl.constexpr, BC: tl.constexpr
):
    """Joins the parts of `moments`: mean and Σ of squared deviations over all pixels, as a tile."""
    inside = (row < n)[:, None] & (channel < c)[None, :]
    mean = tl.zeros([BN, BC], tl.float32)
    m2 = tl.zeros([BN, BC], tl.float32)
    for split in range(splits):
        at = (split * n + row)[:, None] * c + channel[None, :]
        seen = (split * per).to(tl.float32)
        size = tl.minimum(hw - split * per, per).to(tl.float32)
        delta = tl.load(part_mean + at, inside, 0.0) - mean
        mean += delta * (size / (seen + size))
        m2 += tl.load(part_m2 + at, inside, 0.0) + delta * delta * (seen * size / (seen + size))
    return mean, m2


@triton.jit
def statistics(
    part_mean,
    part_m2,
    means,
    mean,
    unbiased,
    inverse_std,
    n,
    c,
    hw,
    per,
    splits,
    eps,
    BATCH: tl.constexpr,
    BN: tl.constexpr,
    BC: tl.constexpr,
):
    """Means (N, C). If BATCH, also mean, unbiased variance and 1/σ (C,), σ² being the biased."""
    channel = tl.program_id(0) * BC + tl.arange(0, BC)
    total = tl.zeros([BC], tl.float32)
    for start in range(0, n, BN):
        row = start + tl.arange(0, BN)
        m, _ = _merged(part_mean, part_m2, row, channel, n, c, hw, per, splits, BN, BC)
        inside = (row < n)[:, None] & (channel < c)[None, :]
        tl.store(means + row[:, None] * c + channel[None, :], m, inside)
        total += tl.sum(m, 0)
    if BATCH:
        average = total / n
        squares = tl.zeros([BC], tl.float32)
        for start in range(0, n, BN):
            row = start + tl.arange(0, BN)
            m, m2 = _merged(part_mean, part_m2, row, channel, n, c, hw, per, splits, BN, BC)
            delta = tl.where((row < n)[:, None], m - average[None, :], 0.0)
            squares += tl.sum(m2 / hw + delta * delta, 0)
        tl.store(mean + channel, average, channel < c)
        count = 1.0 * n * hw
        tl.store(unbiased + channel, squares / n * (count / (count - 1)), channel < c)
        tl.store(inverse_std + channel, 1 / tl.sqrt(squares / n + eps), channel < c)


@triton.jit
def gate(
    means,
    mean,
    inverse_std,
    weight,
    bias,
    kernel,
    pooled,
    gate,
    c,
    K: tl.constexpr,
    BC: tl.constexpr,
):
    """Normalised means and ECA's gate, (N, C) each."""
    i = tl.program_id(0)
    channel = tl.program_id(1) * BC + tl.arange(0, BC)
    logit = tl.zeros([BC], tl.float32)
    for j in tl.static_range(K):
        other = channel + j - K // 2
        inside = (other >= 0) & (other < c)
        m = tl.load(means + i * c + other, inside, 0.0) - tl.load(mean + other, inside, 0.0)
        m *= tl.load(inverse_std + other, inside, 0.0)
        if j == K // 2:
            tl.store(pooled + i * c + channel, m, channel < c)
        g = m * tl.load(weight + other, inside, 0.0) + tl.load(bias + other, inside, 0.0)
        logit += tl.load(kernel + j) * g
    tl.store(gate + i * c + channel, tl.sigmoid(logit), channel < c)


@triton.jit
def _gate_terms(
    part_d, part_dz, inverse_std, weight, bias, gate, i, channel, n, c, splits, BC: tl.constexpr
):
    """Σd and Σd·x̂ over all pixels, and ∂logit, at some channels of sample i; 0 outside."""
    inside = (channel >= 0) & (channel < c)
    sum_d = tl.zeros([BC], tl.float32)
    sum_dx = tl.zeros([BC], tl.float32)
    for split in range(splits):
        at = (split * n + i) * c + channel
        sum_d += tl.load(part_d + at, inside, 0.0)
        sum_dx += tl.load(part_dz + at, inside, 0.0)
    sum_dx *= tl.load(inverse_std + channel, inside, 0.0)
    s = tl.load(gate + i * c + channel, inside, 0.0)
    d_gate = tl.load(weight + channel, inside, 0.0) * sum_dx
    d_gate += tl.load(bias + channel, inside, 0.0) * sum_d
    return sum_d, sum_dx, d_gate * s * (1 - s)


@triton.jit
def gate_backward(
    part_d,
    part_dz,
    inverse_std,
    weight,
    bias,
    kernel,
    pooled,
    gate,
    sum_dy,
    sum_dyx,
    d_pooled,
    d_kernel,
    n,
    c,
    splits,
    K: tl.constexpr,
    BC: tl.constexpr,
):
    """Σ∂y and Σ∂y·x̂ (N, C) for y = BN(z), and ∂pooled (N, C); also parts of ∂kernel."""
    i, block = tl.program_id(0), tl.program_id(1)
    channel = block * BC + tl.arange(0, BC)
    known = channel < c
    sum_d, sum_dx, d_logit = _gate_terms(
        part_d, part_dz, inverse_std, weight, bias, gate, i, channel, n, c, splits, BC
    )
    mine = tl.zeros([BC], tl.float32)
    for j in tl.static_range(K):
        source = channel - j + K // 2  # whose gate this channel's mean went into by weight j
        _, _, theirs = _gate_terms(
            part_d, part_dz, inverse_std, weight, bias, gate, i, source, n, c, splits, BC
        )
        mine += tl.load(kernel + j) * theirs
        other = channel + j - K // 2
        inside = (other >= 0) & (other < c) & known
        g = tl.load(pooled + i * c + other, inside, 0.0) * tl.load(weight + other, inside, 0.0)
        g += tl.load(bias + other, inside, 0.0)
        tl.store(d_kernel + (i * tl.num_programs(1) + block) * K + j, tl.sum(g * d_logit, 0))
    at = i * c + channel
    s = tl.load(gate + at, known, 0.0)
    m = tl.load(pooled + at, known, 0.0)
    tl.store(d_pooled + at, mine, known)
    tl.store(sum_dy + at, s * sum_d + mine, known)
    tl.store(sum_dyx + at, s * sum_dx + mine * m, known)


@triton.jit
def parameter_gradients(
    rows_d,
    rows_dx,
    inverse_std,
    d_weight,
    d_bias,
    rows,
    c,
    NORMALISED: tl.constexpr,
    BN: tl.constexpr,
    BC: tl.constexpr,
):
    """Column sums of two (rows, C). If not NORMALISED, rows_dx holds Σd·(z - mean), not Σd·x̂."""
    channel = tl.program_id(0) * BC + tl.arange(0, BC)
    sum_d = tl.zeros([BC], tl.float32)
    sum_dx = tl.zeros([BC], tl.float32)
    for start in range(0, rows, BN):
        row = start + tl.arange(0, BN)
        inside = (row < rows)[:, None] & (channel < c)[None, :]
        at = row[:, None] * c + channel[None, :]
        sum_d += tl.sum(tl.load(rows_d + at, inside, 0.0), 0)
        sum_dx += tl.sum(tl.load(rows_dx + at, inside, 0.0), 0)
    if not NORMALISED:
        sum_dx *= tl.load(inverse_std + channel, channel < c, 0.0)
    tl.store(d_bias + channel, sum_d, channel < c)
    tl.store(d_weight + channel, sum_dx, channel < c)
