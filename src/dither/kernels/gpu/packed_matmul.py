"""Products with packed weights on the GPU, for codes of 2, 4 and 8 bits.

    y[t, o] = sum_i scale[o, g] (code[o, i] - zero[o, g]) x[t, i],   g = i // group

Weights are read as they are stored (`dither.formats.QTensor`): ``bits / 8`` bytes each, plus scales and zero points. Three ways, and `tuning` takes
the fastest for each size of problem:

    row      few rows of x: float32 products without tensor cores; the time is that of reading the weights. Sums of codes are scaled once a
             group, so weights are not rounded
    tile     weights decoded in registers to the type of x, then tensor cores, float32 sums. Where tiles are few, the columns are cut into parts that
             run side by side and are added in order: the same bits each time
    decode   many rows: the weight written out once in the type of x (2 O I bytes while the call lasts), then torch's own product
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from dither.kernels.checks import check
from dither.kernels.gpu import plans
from dither.kernels.gpu.presence import check_device, interpreted, multiprocessors, on_device
from dither.kernels.gpu.tuning import Plan, fastest
from dither.kernels.packing import packed_stride

WIDTHS = (2, 4, 8)
TYPES = (torch.bfloat16, torch.float16, torch.float32)


def supports(bits: int, group: int, columns: int) -> bool:
    """Whether there is a kernel: 2, 4 or 8 bits, groups that are a power of two from 16 on, or span the row."""
    return bits in WIDTHS and (group >= columns or (group >= 16 and group & (group - 1) == 0))


def packed_matmul(x: Tensor, packed: Tensor, scale: Tensor, zero: Tensor | None, bits: int, group: int, plan: Plan | None = None) -> Tensor:
    """``x [T, I]`` bfloat16, float16 or float32, ``packed [O, stride]`` uint8 (see `dither.kernels.packing`) -> ``[T, O]`` in the type of x.

    ``scale [O, ceil(I / group)]`` float16, bfloat16 or float32; ``zero``: the zero points of that grid as one packed stream, uint8
    ``[ceil(O G bits / 8)]``, or None for the middle code 2^(bits - 1). ``plan``: how to cut the problem; None: the fastest. No gradients. Raises
    ValueError for other shapes, dtypes, widths, groups and devices.
    """
    tokens, columns = _checked(x, packed, scale, zero, bits, group)
    outputs = packed.shape[0]
    if tokens == 0 or outputs == 0 or columns == 0:
        return x.new_zeros(tokens, outputs)

    def run(plan: Plan) -> Tensor:
        return _run(plan, x, packed, scale, zero, bits, group)

    with on_device(x):
        if plan is None:
            key = ("packed", x.device, x.dtype, scale.dtype, zero is None, bits, group, outputs, columns, min(plans.power_above(tokens), 4096))
            plan = fastest(key, candidates(x, outputs, bits), run)
        return run(plan)


def candidates(x: Tensor, outputs: int, bits: int) -> list[Plan]:
    """The plans for ``x [T, I]``, the safest first."""
    tokens, columns = x.shape
    decode = [Plan("decode", block_o=16, block_k=256)]
    if x.dtype == torch.float32:  # tensor cores would round it
        return plans.row_plans(columns) if tokens <= plans.FEW else decode
    tiles = plans.tile_plans(tokens, outputs, columns, multiprocessors(x.device), narrow=False)
    if tokens == 1:
        return plans.row_plans(columns) + tiles[:2]
    if tokens <= plans.FEW:
        return tiles[:4] + plans.row_plans(columns)[:3]
    return tiles if tokens < plans.DECODE_FROM else tiles + decode


def _checked(x: Tensor, packed: Tensor, scale: Tensor, zero: Tensor | None, bits: int, group: int) -> tuple[int, int]:
    """T and I."""
    check("x", x, (None, None), TYPES)
    tokens, columns = x.shape
    if not supports(bits, group, columns):
        raise ValueError(f"bits, group: {bits} bits in groups of {group}; must be 2, 4 or 8 bits in groups of 16, 32, 64, ... or of whole rows")
    check("packed", packed, (None, packed_stride(columns, bits)), (torch.uint8,))
    outputs, groups = packed.shape[0], -(-columns // group)
    check("scale", scale, (outputs, groups), TYPES)
    if zero is not None:
        check("zero", zero, (-(-outputs * groups * bits // 8),), (torch.uint8,))
    if outputs * groups * bits >= 1 << 31:
        raise ValueError(f"scale: {outputs} x {groups} are more than the kernels count")
    check_device("packed_matmul", x, packed, scale, zero)
    return tokens, columns


def _run(plan: Plan, x: Tensor, packed: Tensor, scale: Tensor, zero: Tensor | None, bits: int, group: int) -> Tensor:
    from dither.kernels.gpu import packed_kernels as kernels

    tokens, columns, outputs = x.shape[0], x.shape[1], packed.shape[0]
    groups, stride = scale.shape[1], packed.shape[1]
    zeros = packed if zero is None else zero
    about = {"BITS": bits, "GROUP": 0 if group >= columns else group, "HAS_ZERO": zero is not None, "BLOCK_O": plan.block_o, "BLOCK_K": plan.block_k}
    cut = {"num_warps": plan.warps, "num_stages": plan.stages}
    sizes = (outputs, columns, groups, stride)
    tall = -(-outputs // plan.block_o)
    if plan.kind == "decode":
        weight = x.new_empty(outputs, columns)
        kernels.decode_tile[(tall, -(-columns // plan.block_k))](packed, scale, zeros, weight, *sizes, **about, **cut)
        return F.linear(x, weight)
    y = x.new_empty(tokens, outputs)
    if plan.kind == "row":
        sub = min(128 // bits, plan.block_k, group)  # codes of 16 bytes, which one thread reads
        kernels.product_row[(tall, tokens)](x, packed, scale, zeros, y, *sizes, **about, SUB=sub, STAGES=plan.stages, num_warps=plan.warps)
        return y
    steps, parts = plans.cut(columns, plan.block_k, plan.parts)
    sums = y if parts == 1 else torch.empty(parts, tokens, outputs, dtype=torch.float32, device=x.device)
    about |= {"BLOCK_T": plan.block_t, "INTERPRETED": interpreted()}
    grid = (tall, -(-tokens // plan.block_t), parts)
    kernels.product_tile[grid](x, packed, scale, zeros, sums, tokens, *sizes, steps, **about, **cut)
    if parts > 1:
        kernels.add_parts[(-(-y.numel() // 1024),)](sums, y, parts, y.numel(), BLOCK=1024, num_warps=4)
    return y
