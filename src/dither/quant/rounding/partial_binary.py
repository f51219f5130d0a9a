"""PB-LLM's rounding: one bit for most weights, a salient few on a finer grid, errors pushed on as in GPTQ.

Shang, Yuan, Wu, Dong: PB-LLM: Partially Binarized Large Language Models, ICLR 2024, arXiv 2310.00034.

    M       True where binarised: all but the most salient share (`quant.saliency`), chosen once, on the original weight
    B(w)    mu + alpha sgn(w - mu), sgn(0) = +1, one (mu, alpha) a row and group, from the original weight          (section 3.4)
    P(w)    asymmetric integers, min-max over the whole row of the original weight
    columns q_c = M_c ? B(w_c) : P(w_c) on the *updated* column w_c, in GPTQ's loop (`rounding.columns`); without compensation on the original

``stats`` of B, over the binarised weights of a row and group (n of them, of g):

    masked      mu = mean w,  alpha = mean |w - mu|: least squares in alpha, since d/d alpha sum (w - mu - alpha b)^2 = 0
    lloyd       five rounds of b = sgn(w - mu), mu = mean(w - alpha b), alpha = mean((w - mu) b): no step raises the squared error
    reference   salient places stay in as zeros: mu = sum w / g, alpha = (sum |w - mu| + (g - n) |mu|) / g, shrunk by about n / g. The
                authors' code, which marks it as to be done; for comparison

``refits`` (ours, after decoupleQ, arXiv 2404.12759, section 3.3): with the signs and the salient codes as they are, each row's
(alpha, mu) is solved for the least output error ``(w - q) H (w - q)^T``; before the next refit the codes are made anew on the grids found.
Every row keeps the best that it has met. Uncompensated, this is the H-weighted fit of alpha.

Time: GPTQ's, O I^2 multiply-adds a refit in float64, and a selection over O I values; memory: 6 x 8 O I bytes where refits are asked for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from dither import kernels
from dither.formats import Params, PartialBinary, QTensor, WeightScheme, channel
from dither.formats.partial import half
from dither.kernels import MixedGrid
from dither.quant.parts import Rounded, Rounding
from dither.quant.rounding.columns import check_hessian, damped_inverse_factor
from dither.quant.saliency import METRICS, saliency
from dither.quant.statistics import HESSIAN, Statistics

STATS = ("masked", "reference", "lloyd")
LLOYD_ROUNDS = 5
RIDGE = 1e-9  # relative, for groups whose signs are all equal


@dataclass(frozen=True)
class PartialBinaryNearest(Rounding):
    """The most salient weights by magnitude on their grid, the others at their nearer level; needs no data."""

    stats: str = "masked"

    def __post_init__(self) -> None:
        _check_choice("stats", self.stats, STATS)

    def refuses(self, scheme: WeightScheme) -> str | None:
        return _refuses(scheme)

    def round(self, weight: Tensor, scheme: PartialBinary, params: Params, statistics: Statistics | None) -> Rounded:
        binary = scheme.choose(saliency(weight, metric="magnitude"))
        grid = mixed_grid(weight, binary, scheme, self.stats)
        codes = grid.encode(weight, scheme.column_groups(weight.shape[1]).to(weight.device))
        return Rounded(_packed(scheme, codes, grid), facts=_facts(binary))


@dataclass(frozen=True)
class PartialBinaryColumns(Rounding):
    """PB-LLM as a part; the knobs are those of the module's docstring.

    ``compensate``: push errors on (PB-GPTQ); off, round each weight on its own (RTN-PB). ``act_order``: columns in the order of falling
    Hessian diagonal; saliency is then that of this order. ``damp``, ``block``, ``min_tokens``: as in `Columns`; with fewer tokens
    a layer is rounded as by `PartialBinaryNearest`.
    """

    metric: str = "hessian"
    stats: str = "masked"
    compensate: bool = True
    act_order: bool = False
    refits: int = 0
    damp: float = 0.01
    block: int = 128
    min_tokens: int = 32
    needs: ClassVar[frozenset[str]] = frozenset({HESSIAN})

    def __post_init__(self) -> None:
        _check_choice("metric", self.metric, METRICS)
        _check_choice("stats", self.stats, STATS)
        if self.refits < 0:
            raise ValueError(f"refits must not be negative, not {self.refits}")
        if not self.damp > 0:
            raise ValueError(f"damp must be positive, not {self.damp}")
        if self.block < 1:
            raise ValueError(f"block must be at least 1, not {self.block}")

    def refuses(self, scheme: WeightScheme) -> str | None:
        return _refuses(scheme)

    def round(self, weight: Tensor, scheme: PartialBinary, params: Params, statistics: Statistics | None) -> Rounded:
        if statistics is None or not statistics.has_hessian or statistics.tokens < self.min_tokens:
            seen = 0 if statistics is None else statistics.tokens
            return self._without(weight, scheme, f"{seen} calibration tokens")
        hessian = statistics.hessian
        try:  # layers that read one tensor share the factor
            key = ("factor", self.damp, self.act_order)
            factor = statistics.derived(key, lambda: damped_inverse_factor(hessian, self.damp, self.order(hessian)))
            return self.solve(weight, hessian, scheme, factor)
        except ArithmeticError as failure:
            return self._without(weight, scheme, str(failure))

    def _without(self, weight: Tensor, scheme: PartialBinary, why: str) -> Rounded:
        plain = PartialBinaryNearest(self.stats).round(weight, scheme, {}, None)
        return Rounded(plain.tensor, fallback=f"salient by magnitude, rounded to nearest: {why}", facts=plain.facts)

    def order(self, hessian: Tensor) -> Tensor:
        """``[I]``: the columns in the order in which they are rounded."""
        if not self.act_order:
            return torch.arange(len(hessian), device=hessian.device)
        diagonal = hessian.diagonal()
        return torch.argsort(torch.where(diagonal == 0, 1.0, diagonal), descending=True, stable=True)

    def solve(
        self, weight: Tensor, hessian: Tensor, scheme: PartialBinary, factor: tuple[Tensor, float] | None = None
    ) -> Rounded:
        """``weight [O, I]``, ``hessian [I, I]`` float64, left as it is; ``factor``: what `damped_inverse_factor` gives for it in `order`,
        where that is known. Raises ArithmeticError where it has no factor, ValueError where the scheme does not fit."""
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        work = weight.to(dtype, copy=True)
        work[:, hessian.diagonal() == 0] = 0  # inputs that were always zero: their weights do not matter
        order = self.order(hessian)
        upper, damp = factor or damped_inverse_factor(hessian, self.damp, order)
        upper = upper.to(dtype).contiguous()

        values = torch.empty_like(work)
        values[:, order] = saliency(work[:, order], upper, self.metric)
        binary = scheme.choose(values)
        grid = mixed_grid(work, binary, scheme, self.stats)
        codes, loss = self._codes(work, upper, order, grid, scheme)
        if self.refits or not self.compensate:
            damped = _damped(hessian, damp)
            codes, grid, errors = self._refitted(work, damped, upper, order, codes, grid, scheme)
            loss = float(errors.sum()) / 2
        return Rounded(_packed(scheme, codes, grid), loss=loss, damp=damp, facts=_facts(binary))

    def _codes(
        self, work: Tensor, upper: Tensor, order: Tensor, grid: MixedGrid, scheme: PartialBinary
    ) -> tuple[Tensor, float]:
        """Codes ``[O, I]`` of ``work [O, I]``, and the loss where errors are pushed on."""
        groups = scheme.column_groups(work.shape[1]).to(work.device)
        if not self.compensate:
            return grid.encode(work, groups), 0.0
        moved = MixedGrid(grid.scale, grid.zero, grid.code_max, grid.alpha, grid.mu, grid.binary[:, order].contiguous())
        ordered, loss = kernels.gptq_columns(work[:, order].contiguous(), upper, groups[order], moved, block=self.block)
        codes = torch.empty_like(ordered)
        codes[:, order] = ordered
        return codes, float(loss.sum())

    def _refitted(
        self, work: Tensor, damped: Tensor, upper: Tensor, order: Tensor, codes: Tensor, grid: MixedGrid, scheme: PartialBinary
    ) -> tuple[Tensor, MixedGrid, Tensor]:
        """The codes, the grid, and each row's error ``[O]`` after `refits` rounds; row by row the best that was met."""
        groups = scheme.column_groups(work.shape[1]).to(work.device)
        target = work.double()
        errors = row_errors(grid.decode(codes, groups).double() - target, damped)
        for k in range(self.refits):
            found, its = refit(target, damped, codes, grid, scheme)
            codes, grid, errors = _better(target, damped, groups, (codes, grid, errors), (found, its))
            if k + 1 < self.refits:
                again, _ = self._codes(work, upper, order, grid, scheme)
                codes, grid, errors = _better(target, damped, groups, (codes, grid, errors), (again, grid))
        return codes, grid, errors


def binary_fit(weight: Tensor, binary: Tensor, stats: str = "masked", width: int | None = None) -> tuple[Tensor, Tensor]:
    """``(alpha, mu)``, each ``[O, G]`` in the weight's type, of the two levels ``mu +- alpha`` of the weights of ``weight [O, I]``
    where ``binary [O, I]``, in groups of ``width`` inputs (None: the row); zero for a group without any. See the module for ``stats``."""
    _check_choice("stats", stats, STATS)
    rows, columns = weight.shape
    size = columns if width is None else width
    w, inside = weight.view(rows, -1, size), binary.view(rows, -1, size)  # (O, G, g)
    count = inside.sum(2).clamp(min=1).to(weight.dtype)

    def mean(x: Tensor) -> Tensor:
        return torch.where(inside, x, 0).sum(2) / count

    if stats == "reference":
        total = torch.where(inside, w, 0)  # the mean of a row in which salient weights are zeros
        mu = total.mean(2)
        alpha = (total - mu[:, :, None]).abs().mean(2)
        some = inside.any(2)
        return torch.where(some, alpha, 0), torch.where(some, mu, 0)
    mu = mean(w)
    alpha = mean((w - mu[:, :, None]).abs())
    for _ in range(LLOYD_ROUNDS if stats == "lloyd" else 0):
        b = _sign(w - mu[:, :, None])
        mu = mean(w - alpha[:, :, None] * b)
        alpha = mean((w - mu[:, :, None]) * b)
    return alpha, mu


def mixed_grid(weight: Tensor, binary: Tensor, scheme: PartialBinary, stats: str = "masked") -> MixedGrid:
    """B and P of every row and group, their parameters as they will be stored; all ``[O, G]``."""
    columns = weight.shape[1]
    width = scheme.width(columns)
    alpha, mu = binary_fit(weight, binary, stats, width)
    high = (scheme.high @ channel()).fit(weight)
    spread = torch.ones(1, columns // width, dtype=weight.dtype, device=weight.device)
    scale, zero = high["scale"].to(weight.dtype) * spread, high["zero_point"].to(weight.dtype) * spread
    return MixedGrid(scale, zero, scheme.high.code_max, half(alpha), half(mu), binary)


def row_errors(difference: Tensor, hessian: Tensor) -> Tensor:
    """``d H d^T`` of each row of ``difference [O, I]``: ``[O]``."""
    return ((difference @ hessian) * difference).sum(1)


def refit(
    weight: Tensor, hessian: Tensor, codes: Tensor, grid: MixedGrid, scheme: PartialBinary
) -> tuple[Tensor, MixedGrid]:
    """The (alpha, mu) of every row that minimise ``(q - w) H (q - w)^T`` while signs and salient codes stay; float64, one system of
    ``2 G`` unknowns a row, ``A_o^T H A_o u = A_o^T H r_o`` with the columns of A_o the signs and the places of each group, and r_o what the salient
    weights leave. Rounded to float16. Codes come back too: where alpha came out negative, signs are turned instead."""
    rows, columns = weight.shape
    width = scheme.width(columns)
    count = columns // width
    groups = scheme.column_groups(columns).to(weight.device)
    places = grid.binary.double()
    signs = places * (2.0 * codes.double() - 1)
    rest = weight - torch.where(grid.binary, 0.0, grid.decode(codes, groups).double())  # (O, I)
    right = rest @ hessian
    system = weight.new_zeros(rows, 2 * count, 2 * count, dtype=torch.float64)

    def by_group(x: Tensor) -> Tensor:
        return x.view(rows, count, width).sum(2)  # (O, G)

    for g in range(count):
        own = slice(g * width, (g + 1) * width)
        for row, part in ((g, signs), (count + g, places)):
            through = part[:, own] @ hessian[own]  # (O, I)
            system[:, row, :count] = by_group(through * signs)
            system[:, row, count:] = by_group(through * places)
    wanted = torch.cat([by_group(right * signs), by_group(right * places)], 1)  # (O, 2 G)
    diagonal = system.diagonal(dim1=1, dim2=2)
    diagonal += RIDGE * diagonal.mean(1, keepdim=True) + (diagonal == 0)
    solved, _ = torch.linalg.solve_ex(system, wanted)
    solved = torch.where(torch.isfinite(solved).all(1, keepdim=True), solved, torch.cat([grid.alpha, grid.mu], 1).double())
    alpha, mu = half(solved[:, :count]), half(solved[:, count:])
    turned = grid.binary & (alpha < 0)[:, groups]
    kept = grid.alpha.dtype
    found = MixedGrid(grid.scale, grid.zero, grid.code_max, alpha.abs().to(kept), mu.to(kept), grid.binary)
    return torch.where(turned, 1 - codes, codes), found


def _better(
    target: Tensor, hessian: Tensor, groups: Tensor, held: tuple[Tensor, MixedGrid, Tensor], offered: tuple[Tensor, MixedGrid]
) -> tuple[Tensor, MixedGrid, Tensor]:
    """Row by row the one with less error."""
    codes, grid, errors = held
    found, its = offered
    new = row_errors(its.decode(found, groups).double() - target, hessian)
    take = (new < errors)[:, None]
    alpha, mu = torch.where(take, its.alpha, grid.alpha), torch.where(take, its.mu, grid.mu)
    best = MixedGrid(grid.scale, grid.zero, grid.code_max, alpha, mu, grid.binary)
    return torch.where(take, found, codes), best, torch.minimum(new, errors)


def partial_binary(
    weight: Tensor,
    hessian: Tensor | None,
    scheme: PartialBinary,
    *,
    metric: str = "hessian",
    stats: str = "masked",
    compensate: bool = True,
    act_order: bool = False,
    refits: int = 0,
    damp: float = 0.01,
) -> QTensor:
    """Round ``weight [O, I]`` given ``hessian [I, I]`` = mean x x^T; see `PartialBinaryColumns` for the knobs. A Hessian of None
    does for ``metric="magnitude"`` without compensation and refits; ValueError for the others."""
    part = PartialBinaryColumns(
        metric=metric, stats=stats, compensate=compensate, act_order=act_order, refits=refits, damp=damp
    )
    if hessian is None:
        wants = "metric 'hessian'" if metric == "hessian" else "compensate" if compensate else "refits" if refits else ""
        if wants:
            raise ValueError(f"hessian: {wants} needs calibration data, but none was given")
        return PartialBinaryNearest(stats).round(weight, scheme, {}, None).tensor
    check_hessian(hessian, weight.shape[1])
    return part.solve(weight, hessian.double(), scheme).tensor


def _sign(x: Tensor) -> Tensor:
    """+1 for x >= 0, else -1."""
    return torch.where(x >= 0, 1.0, -1.0).to(x.dtype)


def _damped(hessian: Tensor, damp: float) -> Tensor:
    """The Hessian whose inverse factor `damped_inverse_factor` gives, in natural order."""
    damped = hessian.clone()
    diagonal = damped.diagonal()
    diagonal[diagonal == 0] = 1
    diagonal += damp * diagonal.mean()
    return damped


def _packed(scheme: PartialBinary, codes: Tensor, grid: MixedGrid) -> QTensor:
    return scheme.pack(grid.binary, codes, grid.alpha, grid.mu, grid.scale[:, 0], grid.zero[:, 0])


def _facts(binary: Tensor) -> dict[str, Any]:
    """Salient weights of the rows: they may be spread very unevenly."""
    salient = (~binary).sum(1)
    return {"salient": int(salient.sum()), "rows without": int((salient == 0).sum()), "most in a row": int(salient.max()) if len(salient) else 0}


def _refuses(scheme: WeightScheme) -> str | None:
    return None if isinstance(scheme, PartialBinary) else f"PB-LLM stores one bit for most weights and more for a few, which {scheme} cannot hold"


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, not {value!r}")
