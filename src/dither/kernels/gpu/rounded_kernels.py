"""Triton kernels of products of rounded rows with rounded weights: int8 (sums int32) and float8 e4m3 (sums float32); `w8a8` and `fp8` say what they
compute."""

from __future__ import annotations

import triton
import triton.language as tl

ROUND = tl.constexpr(12582912.0)  # 1.5 2^23: added and taken away again, it leaves the nearest whole number, half to even


@triton.jit
def nearest_e4m3(value):
    """The number of e4m3 nearest to each value of [-448, 448], ties to even, float32: three bits behind the leading one, or steps of 2^-9. The cast
    that follows is exact, so that it does not matter how a device or the interpreter rounds."""
    binade = tl.maximum((value.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True), 0.015625)  # 2^floor(log2 |value|) >= 2^-6
    step = binade * 0.125
    return ((tl.div_rn(value, step) + ROUND) - ROUND) * step


@triton.jit
def round_row(
    x, q, scale, total, columns, limit, smallest, largest,
    STORED: tl.constexpr, WHOLE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A row of x over its scale max|x| / limit, rounded to what q holds; the scale is rounded to the type ``STORED`` first, and NaN where the row
    holds NaN or inf. ``WHOLE``: q is int8, and ``total`` gets the sum of its row."""
    row = tl.program_id(0).to(tl.int64)
    peaks, spoiled = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for start in range(0, columns, BLOCK):
        k = start + tl.arange(0, BLOCK)
        value = tl.load(x + row * columns + k, mask=k < columns, other=0.0).to(tl.float32)
        peaks = tl.maximum(peaks, tl.abs(value))
        spoiled += value * 0.0
    peak = tl.max(peaks, 0)
    s = tl.div_rn(peak, limit)
    if not WHOLE:
        s = tl.where(peak == 0.0, 1.0, s)
    s = tl.minimum(tl.maximum(s, smallest), largest)
    s = tl.maximum(s.to(STORED).to(tl.float32), smallest) + tl.sum(spoiled, 0)
    tl.store(scale + row, s)
    added = tl.zeros([BLOCK], tl.int32)
    for start in range(0, columns, BLOCK):
        k = start + tl.arange(0, BLOCK)
        value = tl.load(x + row * columns + k, mask=k < columns, other=0.0).to(tl.float32)
        value = tl.minimum(tl.maximum(tl.div_rn(value, s + tl.zeros([BLOCK], tl.float32)), -limit), limit)
        value = tl.where(value == value, value, 0.0)  # the scale says NaN
        if WHOLE:
            whole = ((value + ROUND) - ROUND).to(tl.int32)
            added += whole
            tl.store(q + row * columns + k, whole.to(tl.int8), mask=k < columns)
        else:
            tl.store(q + row * columns + k, nearest_e4m3(value).to(tl.float8e4nv), mask=k < columns)
    if WHOLE:
        tl.store(total + row, tl.sum(added, 0))


@triton.jit
def finished(
    sums, q_scale, q_total, scale, zero, row, rows, tokens, outputs,
    WHOLE: tl.constexpr, HAS_ZERO: tl.constexpr, PER_ROW: tl.constexpr,
):  # fmt: skip
    """Sums of the tile of outputs ``rows [R, 1]`` and tokens ``row [1, N]``, zero points taken off, times both scales:

    sum (c - z) q = sum (c - 128) q + (128 - z) sum q."""
    if WHOLE and HAS_ZERO:
        z = tl.load(zero + rows, mask=rows < outputs, other=0).to(tl.int32)
        sums += (128 - z) * tl.load(q_total + row, mask=row < tokens, other=0)
    s = tl.load(scale + (rows if PER_ROW else rows * 0), mask=rows < outputs, other=0.0).to(tl.float32)
    return sums.to(tl.float32) * tl.load(q_scale + row, mask=row < tokens, other=0.0) * s


@triton.jit(do_not_specialize=["tokens", "steps"])  # one compilation for all of them
def rounded_tile(
    q, weight, q_scale, q_total, scale, zero, y, tokens, outputs, columns, stride, steps,
    WHOLE: tl.constexpr, HAS_ZERO: tl.constexpr, PER_ROW: tl.constexpr, FINISH: tl.constexpr,
    BLOCK_O: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A tile of outputs on tensor cores. ``WHOLE``: q is int8, and weights are codes of 8 bits, whose bit patterns with the top bit flipped are
    c - 128. The third axis of programs cuts the columns into parts of ``steps`` blocks; without ``FINISH``, ``y [parts, T, O]`` holds their sums."""
    rows = (tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)).to(tl.int64)[:, None]
    row = (tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)[None, :]
    part = tl.program_id(2)
    total = tl.zeros([BLOCK_O, BLOCK_T], tl.int32 if WHOLE else tl.float32)
    first = part * steps * BLOCK_K
    for start in range(first, tl.minimum(first + steps * BLOCK_K, columns), BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        value = tl.load(q + row * columns + k[:, None], mask=(row < tokens) & (k[:, None] < columns), other=0.0)
        w = tl.load(weight + rows * stride + k[None, :], mask=(rows < outputs) & (k[None, :] < columns), other=0.0)
        if WHOLE:
            total = tl.dot((w ^ 128).to(tl.int8, bitcast=True), value, total, out_dtype=tl.int32)
        else:
            total = tl.dot(w, value, total, max_num_imprecise_acc=BLOCK_K)  # Hopper's own sums keep some 14 bits: every block is added to float32
    place = row * outputs + rows
    inside = (row < tokens) & (rows < outputs)
    if FINISH:
        found = finished(total, q_scale, q_total, scale, zero, row, rows, tokens, outputs, WHOLE, HAS_ZERO, PER_ROW)
        tl.store(y + place, found.to(y.dtype.element_ty), mask=inside)
    else:
        tl.store(y + part.to(tl.int64) * tokens * outputs + place, total, mask=inside)


@triton.jit(do_not_specialize=["count", "tokens"])
def finish_parts(
    parts, q_scale, q_total, scale, zero, y, count, tokens, outputs,
    WHOLE: tl.constexpr, HAS_ZERO: tl.constexpr, PER_ROW: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``parts [count, T, O]``, added in order and finished -> ``y [T, O]``."""
    rows = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)[:, None]
    row = tl.program_id(1).to(tl.int64) + tl.zeros([1, 1], tl.int64)
    total = tl.zeros([BLOCK, 1], tl.int32 if WHOLE else tl.float32)
    place = row * outputs + rows
    for part in range(count):
        total += tl.load(parts + part * tokens * outputs + place, mask=rows < outputs, other=0)
    found = finished(total, q_scale, q_total, scale, zero, row, rows, tokens, outputs, WHOLE, HAS_ZERO, PER_ROW)
    tl.store(y + place, found.to(y.dtype.element_ty), mask=rows < outputs)
