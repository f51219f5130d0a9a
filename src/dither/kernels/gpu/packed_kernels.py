"""Triton kernels of products with packed weights; `packed_matmul` says what they compute and which is taken when.

A code c of b bits becomes a number without a conversion: put into the top bits of a float32's mantissa under the exponent of 2^b it reads
2^b + c, exactly. The offset 2^b joins the zero point, so decoding costs a shift, a mask and one fused operation a weight.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def offset_codes(byte, BITS: tl.constexpr):
    """``byte [R, B]`` uint8, codes of 2, 4 or 8 bits, lowest first -> ``2^BITS + code``, float32 ``[R, B 8 / BITS]``."""
    word = byte.to(tl.int32)
    TOP: tl.constexpr = 23 - BITS  # where a code stands in the mantissa: each is shifted there from where it stands in its byte
    MASK: tl.constexpr = ((1 << BITS) - 1) << TOP
    BASE: tl.constexpr = (127 + BITS) << 23
    if BITS == 8:
        found = (word << TOP) | BASE
    elif BITS == 4:
        found = tl.interleave(((word << TOP) & MASK) | BASE, ((word << (TOP - 4)) & MASK) | BASE)
    else:
        even = tl.interleave(((word << TOP) & MASK) | BASE, ((word << (TOP - 4)) & MASK) | BASE)
        odd = tl.interleave(((word << (TOP - 2)) & MASK) | BASE, ((word << (TOP - 6)) & MASK) | BASE)
        found = tl.interleave(even, odd)
    return found.to(tl.float32, bitcast=True)


@triton.jit
def offset_zeros(zero, index, mask, BITS: tl.constexpr, HAS_ZERO: tl.constexpr):
    """``2^BITS + zero point``, float32, at ``index`` of the packed stream ``zero``; the middle code where there is none."""
    if HAS_ZERO:
        byte = tl.load(zero + (index * BITS >> 3), mask=mask, other=0).to(tl.int32)
        point = (byte >> (index * BITS & 7)) & ((1 << BITS) - 1)
        return point.to(tl.float32) + (1 << BITS)
    else:
        return tl.full(index.shape, (1 << BITS) + (1 << BITS) // 2, tl.float32)


@triton.jit
def decoded_tile(
    packed, scale, zero, rows, start, outputs, groups, stride,
    BITS: tl.constexpr, GROUP: tl.constexpr, HAS_ZERO: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The weights of ``rows [R]`` (int64) at columns ``start ..  start + BLOCK_K``, float32 ``[R, BLOCK_K]``. Columns behind the end hold what the
    padding decodes to, finite: the inputs there are zero. GROUP is a power of two, or 0 for one block a row."""
    BYTES: tl.constexpr = BLOCK_K * BITS // 8
    SUB: tl.constexpr = BLOCK_K if GROUP == 0 or GROUP > BLOCK_K else GROUP
    COUNT: tl.constexpr = BLOCK_K // SUB
    inside = rows[:, None] < outputs
    column = start * BITS // 8 + tl.arange(0, BYTES)
    byte = tl.load(packed + rows[:, None] * stride + column[None, :], mask=inside & (column[None, :] < stride), other=0)
    group = tl.zeros([COUNT], tl.int32) if GROUP == 0 else (start + tl.arange(0, COUNT) * SUB) // GROUP
    index = rows[:, None].to(tl.int32) * groups + group[None, :]
    held = inside & (group[None, :] < groups)
    s = tl.load(scale + index, mask=held, other=0.0).to(tl.float32)  # (R, COUNT)
    z = offset_zeros(zero, index, held, BITS, HAS_ZERO)
    value = offset_codes(byte, BITS)  # (R, BLOCK_K)
    if COUNT == 1:
        return (value - z) * s
    else:
        value = tl.reshape(value, (byte.shape[0], COUNT, SUB))
        return tl.reshape((value - z[:, :, None]) * s[:, :, None], (byte.shape[0], BLOCK_K))


@triton.jit
def product_row(
    x, packed, scale, zero, y, outputs, columns, groups, stride,
    BITS: tl.constexpr, GROUP: tl.constexpr, HAS_ZERO: tl.constexpr,
    BLOCK_O: tl.constexpr, BLOCK_K: tl.constexpr, SUB: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One row of x with BLOCK_O rows of weights, in float32 without tensor cores: sums of SUB codes, each scaled once."""
    COUNT: tl.constexpr = BLOCK_K // SUB
    BYTES: tl.constexpr = BLOCK_K * BITS // 8
    rows = (tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)).to(tl.int64)
    token = tl.program_id(1).to(tl.int64)
    inside = rows[:, None] < outputs
    total = tl.zeros([BLOCK_O, COUNT], tl.float32)
    for start in tl.range(0, columns, BLOCK_K, num_stages=STAGES):
        column = start * BITS // 8 + tl.arange(0, BYTES)
        byte = tl.load(packed + rows[:, None] * stride + column[None, :], mask=inside & (column[None, :] < stride), other=0)
        k = start + tl.arange(0, BLOCK_K)
        value = tl.load(x + token * columns + k, mask=k < columns, other=0.0).to(tl.float32)
        group = tl.zeros([COUNT], tl.int32) if GROUP == 0 else (start + tl.arange(0, COUNT) * SUB) // GROUP
        index = rows[:, None].to(tl.int32) * groups + group[None, :]
        held = inside & (group[None, :] < groups)
        s = tl.load(scale + index, mask=held, other=0.0).to(tl.float32)
        z = offset_zeros(zero, index, held, BITS, HAS_ZERO)
        products = offset_codes(byte, BITS) * value[None, :]  # (BLOCK_O, BLOCK_K)
        sums = tl.sum(tl.reshape(products, (BLOCK_O, COUNT, SUB)), 2)
        inputs = tl.sum(tl.reshape(value, (COUNT, SUB)), 1)
        total += s * (sums - z * inputs[None, :])
    tl.store(y + token * outputs + rows, tl.sum(total, 1).to(y.dtype.element_ty), mask=rows < outputs)


@triton.jit(do_not_specialize=["tokens", "steps"])  # one compilation for all of them
def product_tile(
    x, packed, scale, zero, y, tokens, outputs, columns, groups, stride, steps,
    BITS: tl.constexpr, GROUP: tl.constexpr, HAS_ZERO: tl.constexpr,
    BLOCK_O: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """A tile of outputs on tensor cores: weights decoded to the type of x, float32 sums. The third axis of programs cuts the columns into parts of
    ``steps`` blocks; ``y [parts, T, O]`` then holds their sums, for `add_parts`."""
    rows = (tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)).to(tl.int64)
    row = (tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    part = tl.program_id(2)
    total = tl.zeros([BLOCK_O, BLOCK_T], tl.float32)
    first = part * steps * BLOCK_K
    for start in range(first, tl.minimum(first + steps * BLOCK_K, columns), BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        value = tl.load(x + row[None, :] * columns + k[:, None], mask=(row[None, :] < tokens) & (k[:, None] < columns), other=0.0)
        weight = decoded_tile(packed, scale, zero, rows, start, outputs, groups, stride, BITS, GROUP, HAS_ZERO, BLOCK_K).to(x.dtype.element_ty)
        if INTERPRETED:  # noqa: SIM108 - the interpreter would multiply the bits of bfloat16
            total = tl.dot(weight.to(tl.float32), value.to(tl.float32), total)
        else:
            total = tl.dot(weight, value, total)
    place = part.to(tl.int64) * tokens * outputs + row[None, :] * outputs + rows[:, None]
    tl.store(y + place, total.to(y.dtype.element_ty), mask=(row[None, :] < tokens) & (rows[:, None] < outputs))


@triton.jit(do_not_specialize=["count"])
def add_parts(parts, y, count, size, BLOCK: tl.constexpr):
    """``parts [count, size]`` float32, summed in order, -> ``y [size]``."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for part in range(count):
        total += tl.load(parts + part * size + place, mask=place < size, other=0.0)
    tl.store(y + place, total.to(y.dtype.element_ty), mask=place < size)


@triton.jit
def decode_tile(
    packed, scale, zero, y, outputs, columns, groups, stride,
    BITS: tl.constexpr, GROUP: tl.constexpr, HAS_ZERO: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The weights themselves, ``y [O, I]``."""
    rows = (tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)).to(tl.int64)
    start = tl.program_id(1) * BLOCK_K
    weight = decoded_tile(packed, scale, zero, rows, start, outputs, groups, stride, BITS, GROUP, HAS_ZERO, BLOCK_K)
    k = start + tl.arange(0, BLOCK_K)
    place = rows[:, None] * columns + k[None, :]
    tl.store(y + place, weight.to(y.dtype.element_ty), mask=(rows[:, None] < outputs) & (k[None, :] < columns))
