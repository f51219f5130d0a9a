"""What products of rounded rows share, int8 and float8: rounding each row by its own scale, and the product of tiles."""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch import Tensor

from dither.kernels.gpu import plans
from dither.kernels.gpu.presence import multiprocessors
from dither.kernels.gpu.tuning import Plan, fastest

SCALES = {torch.float16: (2.0**-24, 65504.0), torch.bfloat16: (2.0**-126, 3.3895313892515355e38), torch.float32: (2.0**-126, 3.4028234663852886e38)}


def scale_type(name: str) -> torch.dtype:
    """The dtype called ``name``. Raises ValueError for types that scales of rows cannot be stored in."""
    for dtype in SCALES:
        if str(dtype) == f"torch.{name}":
            return dtype
    raise ValueError(f"input_scale: must be float16, bfloat16 or float32, not {name!r}")


def round_rows(x: Tensor, limit: float, dtype: torch.dtype, scale: str) -> tuple[Tensor, Tensor, Tensor]:
    """``x [T, I]`` -> q ``[T, I]`` of ``dtype`` (int8 or float8_e4m3fn), its scales ``[T]`` float32, rounded to ``scale`` before use, and the sums of
    the rows of q ``[T]`` int32 (int8 only)."""
    import triton.language as tl

    from dither.kernels.gpu import rounded_kernels as kernels

    stored = scale_type(scale)
    tokens, columns = x.shape
    q = torch.empty(tokens, columns, dtype=dtype, device=x.device)
    scales, sums = torch.empty(tokens, dtype=torch.float32, device=x.device), torch.empty(tokens, dtype=torch.int32, device=x.device)
    block = min(plans.power_above(columns), 4096)
    smallest, largest = SCALES[stored]
    kernels.round_row[(tokens,)](
        x, q, scales, sums, columns, limit, smallest, largest,
        STORED=getattr(tl, scale), WHOLE=dtype == torch.int8, BLOCK=block, num_warps=8 if block > 1024 else 4,
    )  # fmt: skip
    return q, scales, sums


def product(
    key: str, x: Tensor, limit: float, input_scale: str, weight: Tensor, scale: Tensor, zero: Tensor | None, plan: Plan | None
) -> Tensor:
    """``x [T, I]`` rounded row by row, times ``weight [O, stride]``, uint8 codes or float8."""
    tokens, columns, outputs = x.shape[0], x.shape[1], weight.shape[0]
    if tokens == 0 or outputs == 0 or columns == 0:
        return x.new_zeros(tokens, outputs)
    whole = weight.dtype == torch.uint8
    rounded = round_rows(x, limit, torch.int8 if whole else weight.dtype, input_scale)

    def run(plan: Plan) -> Tensor:
        return _run(plan, x.dtype, *rounded, weight, scale, zero)

    if plan is None:
        per_row, size = scale.numel() > 1, min(plans.power_above(tokens), 4096)
        name: Hashable = (key, x.device, x.dtype, scale.dtype, zero is None, per_row, outputs, columns, size)
        plan = fastest(name, plans.tile_plans(tokens, outputs, columns, multiprocessors(x.device), narrow=True), run)
    return run(plan)


def _run(
    plan: Plan, dtype: torch.dtype, q: Tensor, q_scale: Tensor, q_sum: Tensor, weight: Tensor, scale: Tensor, zero: Tensor | None
) -> Tensor:
    from dither.kernels.gpu import rounded_kernels as kernels

    (tokens, columns), (outputs, stride) = q.shape, weight.shape
    whole = q.dtype == torch.int8
    y = torch.empty(tokens, outputs, dtype=dtype, device=q.device)
    steps, parts = plans.cut(columns, plan.block_k, plan.parts)
    sums = y if parts == 1 else torch.empty(parts, tokens, outputs, dtype=torch.int32 if whole else torch.float32, device=q.device)
    about = {"WHOLE": whole, "HAS_ZERO": zero is not None, "PER_ROW": scale.numel() > 1}
    rest = (q_scale, q_sum, scale, q_sum if zero is None else zero)
    grid = (-(-outputs // plan.block_o), -(-tokens // plan.block_t), parts)
    kernels.rounded_tile[grid](
        q, weight, *rest, sums, tokens, outputs, columns, stride, steps, **about,
        FINISH=parts == 1, BLOCK_O=plan.block_o, BLOCK_T=plan.block_t, BLOCK_K=plan.block_k, num_warps=plan.warps, num_stages=plan.stages,
    )  # fmt: skip
    if parts > 1:
        kernels.finish_parts[(-(-outputs // 512), tokens)](sums, *rest, y, parts, tokens, outputs, **about, BLOCK=512, num_warps=4)
    return y
