"""GPTQ: rounds a weight column by column, each column's error pushed onto the columns not yet rounded.

Frantar, Ashkboos, Hoefler, Alistarh: GPTQ, ICLR 2023, arXiv 2210.17323. Also: OPTQ; the same integers as LDLQ (QuIP).

Minimises, for each row w of W [O, I] independently, (w - q) H (w - q)^T with H = mean x x^T:

    U upper triangular with H^-1 = U^T U
    for column c:  e = (w_c - q_c) / U_cc;   w_j <- w_j - e U_cj  for j > c          (eq. 2 and 3, Cholesky form of section 3.3)

so that the damped loss is exactly sum e^2. Time: I^3 / 3 for the factor and O I^2 for the loop; memory: 3 x 8 I^2 bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from dither import kernels
from dither.formats import Clip, Params, QTensor, Scheme, clip_search
from dither.quant.parts import Rounded, Rounding
from dither.quant.rounding.nearest import nearest
from dither.quant.statistics import HESSIAN, Statistics

RETRIES = 5  # damping grows tenfold at each
LEAF = 96  # rows of a triangle that is inverted at once


def damped_inverse_factor(hessian: Tensor, damp: float, order: Tensor | None = None) -> tuple[Tensor, float]:
    """``U`` upper triangular with ``(H + d mean(diag H) I)^-1 = U^T U``, and the relative damping ``d`` that it took.

    ``hessian [I, I]`` is left as it is; rows and columns are taken in ``order``; a zero on the diagonal counts as 1.

    One Cholesky of the reversed matrix and one triangular solve: with J the reversal, ``J H J = C C^T`` gives ``U = J C^-1 J``.
    Where the factorisation fails, the damping grows tenfold, up to five times. Raises ArithmeticError after that.
    """
    backwards = torch.arange(len(hessian)).flip(0) if order is None else order.flip(0)
    backwards = backwards.to(hessian.device)
    damped = hessian[backwards[:, None], backwards]
    diagonal = damped.diagonal().clone()
    diagonal[diagonal == 0] = 1
    mean = diagonal.mean()
    for _ in range(RETRIES):
        damped.diagonal().copy_(diagonal + damp * mean)
        lower, info = torch.linalg.cholesky_ex(damped)
        if int(info) == 0 and bool(torch.isfinite(lower.diagonal()).all()):
            del damped
            return inverse_of_lower(lower).flip(0, 1), damp
        damp = max(damp, 1e-3) * 10
    raise ArithmeticError(f"the Hessian has no Cholesky factor even with {damp / 10:g} of its mean diagonal added")


def inverse_of_lower(lower: Tensor) -> Tensor:
    """The inverse of a lower triangular matrix ``[n, n]``, by halves: a third of the operations of solving for the identity, nearly all of
    them in matrix products. ``[A 0; B C]^-1 = [A^-1 0; -C^-1 B A^-1  C^-1]``."""
    size = len(lower)
    if size <= LEAF:
        identity = torch.eye(size, dtype=lower.dtype, device=lower.device)
        solved: Tensor = torch.linalg.solve_triangular(lower, identity, upper=False)
        return solved
    inverse, half = torch.zeros_like(lower), size // 2
    first, last = slice(0, half), slice(half, size)
    inverse[first, first], inverse[last, last] = inverse_of_lower(lower[first, first]), inverse_of_lower(lower[last, last])
    inverse[last, first] = -(inverse[last, last] @ (lower[last, first] @ inverse[first, first]))
    return inverse


def check_hessian(hessian: Tensor, features: int, name: str = "hessian") -> None:
    """Raises ValueError unless ``hessian`` is ``[I, I]``, finite and symmetric to 1e-4 of its largest entry."""
    if hessian.shape != (features, features):
        raise ValueError(f"{name}: shape {tuple(hessian.shape)}, but the weight has {features} inputs")
    if not bool(torch.isfinite(hessian).all()):
        raise ValueError(f"{name}: holds NaN or inf")
    if features and float((hessian - hessian.T).abs().max()) > 1e-4 * float(hessian.abs().max()):
        raise ValueError(f"{name}: is not symmetric")


@dataclass(frozen=True)
class Columns(Rounding):
    """GPTQ as a part.

    ``act_order``: columns in the order of falling Hessian diagonal (needs ``static_groups``, so that storage keeps its order).
    ``static_groups``: grids are those of the original weight; else each group is fitted from the updated weights when the
    loop reaches it. ``damp``: relative damping; grows until the factorisation holds. ``block``: columns a lazy update.
    ``compat``: "reference" fits dynamic groups as the paper's code does, from weights that lack the updates of the current lazy block.
    ``clip``: a search of the ranges of dynamic groups, where the scheme has none of its own.
    ``min_tokens``: below this many calibration tokens a layer is rounded to nearest instead.
    """

    act_order: bool = True
    static_groups: bool = True
    damp: float = 0.01
    block: int = 128
    compat: str = "none"
    min_tokens: int = 32
    clip: Clip | None = None
    needs: ClassVar[frozenset[str]] = frozenset({HESSIAN})

    def __post_init__(self) -> None:
        if self.act_order and not self.static_groups:
            raise ValueError("act_order needs static_groups: columns of one group would be scattered over the matrix")
        if self.compat not in ("none", "reference"):
            raise ValueError(f"compat must be 'none' or 'reference', not {self.compat!r}")
        if self.compat == "reference" and self.static_groups:
            raise ValueError("compat='reference' is about dynamic groups: it needs static_groups=False")
        if not self.damp > 0:
            raise ValueError(f"damp must be positive, not {self.damp}")
        if self.clip is not None and self.static_groups:
            raise ValueError("clip is of dynamic groups: it needs static_groups=False; static ones come from a grid")
        if self.block < 1:
            raise ValueError(f"block must be at least 1, not {self.block}")

    @property
    def own_grid(self) -> bool:
        return not self.static_groups

    def aimed_at(self, weight: Tensor, statistics: Statistics | None) -> Tensor:
        return weight if statistics is None or self._too_little(statistics) else without_dead_inputs(weight, statistics.hessian)

    def _too_little(self, statistics: Statistics) -> bool:
        return not statistics.has_hessian or statistics.tokens < self.min_tokens

    def round(self, weight: Tensor, scheme: Scheme, params: Params, statistics: Statistics | None) -> Rounded:
        if statistics is None or self._too_little(statistics):
            seen = 0 if statistics is None else statistics.tokens
            return Rounded(nearest(weight, scheme, params), fallback=f"rounded to nearest: {seen} calibration tokens")
        hessian = statistics.hessian
        order = self.order(hessian)
        try:  # layers that read one tensor share the factor
            key = ("factor", self.damp, self.act_order)
            factor = statistics.derived(key, lambda: damped_inverse_factor(hessian, self.damp, order))
            return self.solve(weight, hessian, scheme, params, factor)
        except ArithmeticError as failure:
            return Rounded(nearest(weight, scheme, params), fallback=f"rounded to nearest: {failure}")

    def order(self, hessian: Tensor) -> Tensor:
        """``[I]``: the columns in the order in which they are rounded."""
        if not self.act_order:
            return torch.arange(len(hessian), device=hessian.device)
        diagonal = hessian.diagonal()
        return torch.argsort(torch.where(diagonal == 0, 1.0, diagonal), descending=True, stable=True)

    def solve(
        self,
        weight: Tensor,
        hessian: Tensor,
        scheme: Scheme,
        params: Params | None = None,
        factor: tuple[Tensor, float] | None = None,
    ) -> Rounded:
        """``weight [O, I]``, ``hessian [I, I]`` float64, left as it is; ``factor``: what `damped_inverse_factor` gives for it, where that is
        known. Raises ArithmeticError where it has no factor."""
        outputs, features = weight.shape
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        work = without_dead_inputs(weight.to(dtype, copy=True, memory_format=torch.contiguous_format), hessian)
        params = scheme.fit(work) if params is None else params

        order = self.order(hessian)
        if self.act_order:
            work = work[:, order].contiguous()
        upper, damp = factor or damped_inverse_factor(hessian, self.damp, order)
        upper = upper.to(dtype).contiguous()

        if self.static_groups:
            codes, loss = _static(work, upper, scheme, params, order, self.block)
        else:
            codes, loss, params = _dynamic(work, upper, scheme, params, self.clip or scheme.clip, self.block, self.compat == "reference")
        natural = torch.empty_like(codes)
        natural[:, order] = codes
        return Rounded(QTensor.from_codes(natural, params, scheme, (outputs, features)), loss=loss, damp=damp)


def without_dead_inputs(weight: Tensor, hessian: Tensor) -> Tensor:
    """``weight [O, I]`` with zeros for inputs that were always zero, whose weights do not matter."""
    dead = hessian.diagonal() == 0
    return weight.masked_fill(dead, 0) if bool(dead.any()) else weight


def _static(
    work: Tensor, factor: Tensor, scheme: Scheme, params: Params, order: Tensor, block: int
) -> tuple[Tensor, float]:
    group_of = scheme.column_groups(work.shape[1]).to(order.device)[order]
    grid = per_row(params, scheme, work.shape[0])
    codes, loss = kernels.gptq_columns(work, factor, group_of, scheme.format.column_grid(grid), block=block)
    return codes, float(loss.sum())


def _dynamic(
    work: Tensor, factor: Tensor, scheme: Scheme, params: Params, clip: Clip | None, block: int, stale: bool
) -> tuple[Tensor, float, Params]:
    """Each group's grid is fitted from the weights as updated by all columns before it, when its first column is reached."""
    group_of = scheme.column_groups(work.shape[1])
    shared = {k: v for k, v in params.items() if v.dim() == 0}
    fitted: dict[str, list[Tensor]] = {}

    def fit(columns: Tensor) -> Mapping[str, Tensor]:
        if clip is None:
            found = scheme.format.fit(columns, shared or None)
        else:
            blocks = columns[:, None, :]
            searched = clip_search(blocks, scheme.format, clip, shared=shared or None)
            found = {k: v if v.dim() == 0 else v[:, 0] for k, v in searched.items()}
        for key, value in found.items():
            if value.dim():
                fitted.setdefault(key, []).append(value)
        return found

    codes, loss = kernels.gptq_columns_dynamic(work, factor, group_of, scheme.format, fit, block=block, stale=stale)
    return codes, float(loss.sum()), {**{k: torch.stack(v, 1) for k, v in fitted.items()}, **shared}


def per_row(params: Params, scheme: Scheme, rows: int) -> Params:
    """Grid parameters ``[R, C]`` spread over the rows of the matrix: ``[O, C]``."""
    index = scheme.blocks.row_groups(rows)
    return {
        k: v if v.dim() == 0 or v.shape[0] == rows else v[index.to(v.device)].contiguous() for k, v in params.items()
    }


def columns(
    weight: Tensor,
    hessian: Tensor,
    scheme: Scheme,
    params: Params | None = None,
    *,
    act_order: bool = True,
    damp: float = 0.01,
    block: int = 128,
    static_groups: bool = True,
) -> QTensor:
    """Round ``weight [O, I]`` given ``hessian [I, I]`` = mean x x^T; see `Columns` for the knobs."""
    check_hessian(hessian, weight.shape[1])
    part = Columns(act_order=act_order, static_groups=static_groups, damp=damp, block=block)
    return part.solve(weight, hessian.double(), scheme, params).tensor
