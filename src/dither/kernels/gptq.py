"""The column loop of GPTQ, in C++ where the extension is there; see `dither.kernels.gptq_reference` for what it
computes.

Time: O I^2 / 2 multiply-adds, near the processor's peak; memory: I^2 / 2 for the packed factor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from torch import Tensor

from dither.kernels.checks import check, check_range
from dither.kernels.extension import extension, isa, threads
from dither.kernels.gptq_reference import gptq_reference
from dither.kernels.grids import AffineGrid, ColumnGrid, MixedGrid, OffsetGrid

_KINDS = {"AffineGrid": 0, "OffsetGrid": 1, "TableGrid": 2, "MixedGrid": 3}  # GridKind of csrc/gptq.hpp


class ColumnFormat(Protocol):
    """A number format as the dynamic loop sees it: parameters ``[O, G]`` in, grid out."""

    def column_grid(self, params: Mapping[str, Tensor]) -> ColumnGrid: ...


def gptq_columns(
    weight: Tensor, factor: Tensor, column_group: Tensor, grid: ColumnGrid, *, block: int = 128
) -> tuple[Tensor, Tensor]:
    """Round ``weight [O, I]`` (float32 or float64) column by column, in the order given.

    ``factor [I, I]``: ``U``, upper triangular, with ``H^-1 = U^T U``, in the weight's dtype; ``column_group [I]``
    int64: which column of the grid's parameters each input uses, in any order. ``block`` only groups the reference's
    updates: no result depends on it.

    Returns ``codes [O, I]`` uint8 and ``loss [O]`` float64, ``sum_c e_c^2 / 2`` of each row: half of
    ``(w - q) H (w - q)^T``. Raises ValueError for wrong shapes, dtypes, strides, indices or a factor that is not
    positive.
    """
    codes, loss, _ = gptq_errors(weight, factor, column_group, grid, block=block, keep_errors=False)
    return codes, loss


def gptq_columns_dynamic(
    weight: Tensor, factor: Tensor, column_group: Tensor, form: ColumnFormat,
    fit: Callable[[Tensor], Mapping[str, Tensor]], *, block: int = 128, stale: bool = False,
) -> tuple[Tensor, Tensor]:
    """The same with grids that follow the weights: ``fit(columns [O, n])`` gives a group's parameters when its first
    column is reached.

    ``columns`` are the weights as updated by every column before the group; with ``stale``, only by the columns before
    the lazy block of ``block`` columns in which the group begins, as the paper's code reads them. Parameters are ``[O]``
    (one a row) or 0-d (shared), and ``form.column_grid`` turns them, as ``[O, G]``, into the grid. ``column_group`` must
    be ``0, 0, .., 1, 1, ..``.
    """
    widths = torch.unique_consecutive(column_group, return_counts=True)[1]
    if not torch.equal(column_group, torch.repeat_interleave(widths)):
        raise ValueError("column_group: dynamic groups must be contiguous and in ascending order from 0")
    ends = widths.cumsum(0).tolist()
    starts = [0, *ends[:-1]]
    total = weight.shape[1]
    strides = [(i, min(i + block, total)) for i in range(0, total, block)] if stale else zip(starts, ends, strict=True)
    work = weight.clone()
    codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    loss = torch.zeros(weight.shape[0], dtype=torch.float64, device=weight.device)
    fitted: list[Mapping[str, Tensor]] = []
    for first, last in strides:
        while len(fitted) < len(starts) and starts[len(fitted)] < last:
            fitted.append(fit(work[:, starts[len(fitted)] : ends[len(fitted)]]))
        own = column_group[first:last]
        params = fitted[int(own[0]) : int(own[-1]) + 1]
        joined = {n: torch.stack([p[n] for p in params], 1) if v.dim() else v for n, v in params[0].items()}
        grid = form.column_grid(joined)
        block_factor = factor[first:last, first:last].contiguous()
        columns = work[:, first:last].contiguous()
        codes[:, first:last], part, errors = gptq_errors(columns, block_factor, own - own[0], grid, block=block)
        loss += part
        work[:, last:].addmm_(errors, factor[first:last, last:], alpha=-1)
    return codes, loss


def gptq_errors(
    weight: Tensor, factor: Tensor, column_group: Tensor, grid: ColumnGrid, *, block: int = 128,
    keep_errors: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """`gptq_columns` that also returns ``E [O, I]``, each column's error ``(w_c - q_c) / U_cc`` when it was rounded
    (``W - Q = E U``); empty unless ``keep_errors``.
    """
    check("weight", weight, (None, None), (torch.float32, torch.float64))
    rows, columns = weight.shape
    check("factor", factor, (columns, columns), (weight.dtype,))
    check("column_group", column_group, (columns,), (torch.int64,))
    grid = grid.to(weight.dtype)
    grid.check(rows)
    if isinstance(grid, MixedGrid):
        check("binary", grid.binary, (rows, columns), (torch.bool,))
    check_range("column_group", column_group, 0, grid.scale.shape[1] - 1)
    if block < 1:
        raise ValueError(f"block: must be at least 1, not {block}")
    diagonal = factor.diagonal()
    if not bool(((diagonal > 0) & torch.isfinite(diagonal)).all()):
        raise ValueError("factor: its diagonal must be positive and finite")

    native = extension() if weight.device.type == "cpu" else None
    if native is None:
        return gptq_reference(weight, factor, column_group, grid, block)
    codes = torch.empty(rows, columns, dtype=torch.uint8)
    loss = torch.empty(rows, dtype=torch.float64)
    errors = torch.empty(rows if keep_errors else 0, columns, dtype=weight.dtype)
    shift = table = edges = table_codes = levels = binary = None
    code_max = 0
    if isinstance(grid, AffineGrid):
        shift, code_max = grid.zero, grid.code_max
    elif isinstance(grid, OffsetGrid):
        shift, code_max = grid.offset, grid.code_max
    elif isinstance(grid, MixedGrid):
        shift, code_max, levels, binary = grid.zero, grid.code_max, grid.levels(), grid.binary.view(torch.uint8)
    else:
        table, edges, table_codes = grid.table, grid.edges(), grid.codes
    native.gptq(
        weight.detach(), factor.detach(), grid.scale, shift, column_group, _KINDS[type(grid).__name__], code_max, table,
        edges, table_codes, levels, binary, codes, loss, errors if keep_errors else None, isa(), threads(),
    )
    return codes, loss, errors
