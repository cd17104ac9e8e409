"""The Triton kernels of the fused tail that work on (N, C) tensors alone.

They compute in float32 what `formulas` computes between the passes: statistics, the gate, and the
gradients of both. `triton_pass_kernels` leaves a reduction over the pixels in parts; these kernels
add the parts, always in the same order.
"""

import triton
import triton.language as tl


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
