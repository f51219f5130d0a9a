"""Learned rounding of one layer on its own, from the Hessian of its inputs alone: soft roundings on the layer objective.

    loss = tr((W - W_hat) H (W - W_hat)^T),   H = mean x x^T;        G = 2 (W_hat - W) H  is its exact gradient over all calibration data

AdaRound's original setting (arXiv 2004.10568, eq. 21), with the quadratic in place of sampled activations: no data is touched after H, and no
mini-batch noise. A step costs O I^2 multiply-adds and a dozen passes over the weight. For grids with a scale a row or group, GPTQ
(`columns`) solves this objective better and faster; learning pays where the grid is coarse (one scale a tensor), or on blocks (`reconstruct`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from dither.formats import Params, QTensor, Scheme, WeightScheme
from dither.quant.parts import Rounded, Rounding
from dither.quant.rounding.columns import Columns, check_hessian
from dither.quant.rounding.flexround import Division
from dither.quant.rounding.nearest import nearest
from dither.quant.rounding.soft import Descent, Diverged, Kept, Softening, into_cells
from dither.quant.statistics import HESSIAN, Statistics

STARTS = ("nearest", "gptq")
LOOKS = 100  # how often the codes themselves are judged


@dataclass(frozen=True)
class Learned(Rounding):
    """``soft``: how rounding is made differentiable; ``steps``, ``lr``: of Adam under a cosine; ``keep_best``: the best codes seen, the start
    included, rather than the last; ``start``: "nearest", or "gptq" (`columns`, act-order); ``min_tokens``: below this many calibration tokens
    a layer is rounded to nearest."""

    soft: Softening = field(default_factory=Division)
    steps: int = 2000
    lr: float = 5e-3
    keep_best: bool = True
    start: str = "nearest"
    min_tokens: int = 32
    needs: ClassVar[frozenset[str]] = frozenset({HESSIAN})

    def __post_init__(self) -> None:
        check_knobs(self.steps, self.lr, self.start)

    def refuses(self, scheme: WeightScheme) -> str | None:
        return self.soft.refuses(scheme)

    def round(self, weight: Tensor, scheme: Scheme, params: Params, statistics: Statistics | None) -> Rounded:
        if statistics is None or not statistics.has_hessian or statistics.tokens < self.min_tokens:
            seen = 0 if statistics is None else statistics.tokens
            return Rounded(nearest(weight, scheme, params), fallback=f"rounded to nearest: {seen} calibration tokens")
        return self.solve(weight, statistics.hessian, scheme, params)

    def solve(self, weight: Tensor, hessian: Tensor, scheme: Scheme, params: Params) -> Rounded:
        """``weight [O, I]``, ``hessian [I, I]`` float64, left as it is. Raises FloatingPointError where the loss stops being finite."""
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        weight, h = weight.to(dtype), hessian.to(dtype)
        rtn = nearest(weight, scheme, params)
        base = started(weight, scheme, params, hessian if self.start == "gptq" else None)

        def loss_of(state: tuple[Tensor, Params]) -> float:
            found = scheme.decode(state[0], {k: v.to(dtype) for k, v in state[1].items()}).sub_(weight)
            return float((found @ h).mul_(found).sum(dtype=torch.float64))

        states = {"": (scheme.encode(base, params), params)}
        kept = Kept(states, loss_of(states[""]))
        loss0 = loss_of((rtn.codes, params))
        if kept.loss > 0:
            self._descend(weight, base, h, scheme, params, kept, loss_of)
        codes, found = kept.states[""]
        facts = {"rtn_loss": loss0, "step": kept.step, **movement(codes, found, rtn.codes, params)}
        return Rounded(QTensor.from_codes(codes, found, scheme, tuple(weight.shape)), loss=kept.loss, facts=facts)

    def _descend(
        self, weight: Tensor, base: Tensor, h: Tensor, scheme: Scheme, params: Params, kept: Kept, loss_of: Any
    ) -> None:
        soft = self.soft.start(base, scheme, params)
        factor = 2 * weight.numel() / kept.loss
        descent = Descent(soft.parameters(), self.lr, self.steps)
        every = max(1, self.steps // LOOKS)
        for step in range(1, self.steps + 1):
            with torch.enable_grad():
                w_hat = soft.weight(weight.dtype)
                extra = soft.regulariser(descent.progress)
            gradient = (w_hat.detach() - weight) @ h * factor
            torch.autograd.backward([w_hat, *([] if extra is None else [extra])], [gradient, *([] if extra is None else [None])])
            descent.step()
            if step % every == 0 or step == self.steps:
                state = soft.finish()
                loss = loss_of(state)
                if not math.isfinite(loss):
                    raise Diverged("learned rounding", step, kept)
                kept.offer({"": state}, loss, step, always=not self.keep_best)


def check_knobs(steps: int, lr: float, start: str) -> None:
    """Raises ValueError for values out of range."""
    if steps < 1:
        raise ValueError(f"steps must be at least 1, not {steps}")
    if not lr > 0 or not math.isfinite(lr):
        raise ValueError(f"lr must be positive, not {lr}")
    if start not in STARTS:
        raise ValueError(f"start must be one of {', '.join(STARTS)}, not {start!r}")


def started(weight: Tensor, scheme: Scheme, params: Params, hessian: Tensor | None) -> Tensor:
    """The matrix whose nearest codes learning starts from: the weight itself, or (given a Hessian) one that rounds to GPTQ's codes."""
    if hessian is None:
        return weight
    try:
        chosen = Columns().solve(weight, hessian, scheme, params).tensor.codes
    except ArithmeticError:  # no factor: the weight itself will do
        return weight
    return into_cells(weight, chosen, scheme, params)


def movement(codes: Tensor, params: Params, rtn: Tensor, params0: Params) -> dict[str, Any]:
    """How far learning went: shares of codes that are 0, 1, 2, more than 2 codes from round-to-nearest's, and the root mean square of the
    change of log scales."""
    steps = (codes.to(torch.int16) - rtn.to(torch.int16)).abs().clamp_(max=3).long()
    shares = torch.bincount(steps.reshape(-1), minlength=4).double() / max(steps.numel(), 1)
    change = (params["scale"].double() / params0["scale"].double()).log()
    return {"moved": [float(s) for s in shares], "grid_change": float(change.square().mean().sqrt())}


def learned(
    weight: Tensor,
    scheme: Scheme,
    params: Params | None = None,
    *,
    hessian: Tensor,
    steps: int = 2000,
    lr: float = 5e-3,
    soft: Softening | None = None,
    keep_best: bool = True,
    start: str = "nearest",
) -> tuple[QTensor, dict[str, Any]]:
    """Round ``weight [O, I]`` given ``hessian [I, I]`` = mean x x^T by learning; see `Learned` for the knobs (``soft``: FlexRound's division).

    The second value tells ``loss0`` (round-to-nearest on the same grid), ``loss``, ``step`` (of the codes that were kept), ``moved`` (shares of
    codes 0, 1, 2, more than 2 from round-to-nearest's) and ``grid_change`` (root mean square change of log scales).
    Raises ValueError for values out of range and schemes that cannot be learned, FloatingPointError where learning diverges.
    """
    check_hessian(hessian, weight.shape[1])
    part = Learned(soft or Division(), steps, lr, keep_best, start)
    why = part.refuses(scheme)
    if why is not None:
        raise ValueError(why)
    with torch.no_grad():
        found = part.solve(weight, hessian.double(), scheme, scheme.fit(weight) if params is None else params)
    assert isinstance(found.tensor, QTensor)
    facts = dict(found.facts)
    return found.tensor, {"loss0": facts.pop("rtn_loss"), "loss": found.loss, **facts}
