"""AdaRound: learns for each weight whether to round up or down, through a relaxation that is driven to 0 or 1.

Nagel, Amjad, van Baalen, Louizos, Blankevoort: Up or Down? Adaptive Rounding for Post-Training Quantization, ICML 2020, arXiv 2004.10568,
equations 21 to 24; over blocks: BRECQ, arXiv 2102.05426 (whose code the details follow). FlexRound's baseline.

    W_hat = s (clip(floor(W / s) + h(a) + z, 0, 2^b - 1) - z),    h(a) = clip(sigmoid(a) (zeta - gamma) + gamma, 0, 1)
    regulariser  lambda sum(1 - |2 h - 1|^beta),   zeta = 1.1, gamma = -0.1;   beta falls linearly from 20 to 2; nothing during warm-up

a starts where h is the fraction of W / s, so that W_hat = W within the range; at the end a >= 0 rounds up. Grids stay as they are. ``lambda`` is
in units of the start's loss a weight (see `soft`): the paper's 0.01 belongs to a loss that is not normalised.
Memory: 4 bytes a weight each for a, its gradient, two moments of Adam, floor(W / s), and what autograd keeps (about six more).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dither.formats import Int, Params, Scheme, WeightScheme
from dither.quant.rounding.soft import Levels, Softening, SoftRounding, Spread, effective, refuses_grid

ZETA, GAMMA = 1.1, -0.1


@dataclass(frozen=True)
class UpOrDown(Softening):
    """AdaRound's parametrisation. ``penalty``: lambda; ``warmup``: share of the steps without regulariser; ``beta``: its first and last
    exponent."""

    penalty: float = 1.0
    warmup: float = 0.2
    beta: tuple[float, float] = (20.0, 2.0)

    def __post_init__(self) -> None:
        if not self.penalty >= 0 or not math.isfinite(self.penalty):
            raise ValueError(f"penalty must not be negative, not {self.penalty}")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"warmup must lie in [0, 1), not {self.warmup}")
        if not all(b > 0 for b in self.beta):
            raise ValueError(f"beta must be two positive exponents, not {self.beta}")

    def start(self, weight: Tensor, scheme: Scheme, params: Params, *, kernel: int = 1) -> Relaxed:
        return Relaxed(weight, scheme, params, self)

    def refuses(self, scheme: WeightScheme) -> str | None:
        return refuses_grid("AdaRound", scheme, floats=False)


class Relaxed(SoftRounding):
    """``W_hat`` as a function of ``alpha [O, I]``."""

    def __init__(self, weight: Tensor, scheme: Scheme, params: Params, knobs: UpOrDown) -> None:
        assert isinstance(scheme.format, Int)
        self.scheme, self.params, self.knobs, self.shape = scheme, params, knobs, weight.shape
        self.spread = Spread(scheme, *weight.shape)
        self.levels = Levels(scheme, params, self.spread, weight.dtype)
        self.scale = self.spread.out(effective(params["scale"].to(weight.dtype), scheme, params)[1])
        base = self.spread.view(weight)
        ratio = (base if self.levels.offset is None else base - self.levels.offset) / self.scale
        self.floor = ratio.floor()
        fraction = ratio - self.floor
        self.alpha = (-torch.log((ZETA - GAMMA) / (fraction - GAMMA) - 1)).requires_grad_()

    def parameters(self) -> list[Tensor]:
        return [self.alpha]

    def share(self) -> Tensor:
        """``h(alpha)``, shaped as `Spread` sees the matrix."""
        return torch.clamp(torch.sigmoid(self.alpha) * (ZETA - GAMMA) + GAMMA, 0, 1)

    def weight(self, dtype: torch.dtype) -> Tensor:
        return self._values(self.share()).to(dtype)

    def _values(self, up: Tensor) -> Tensor:
        value = self.levels.clip(self.floor + up) * self.scale
        if self.levels.offset is not None:
            value = value + self.levels.offset
        return value.reshape(self.shape)

    def regulariser(self, progress: float) -> Tensor | None:
        knobs = self.knobs
        if progress < knobs.warmup or knobs.penalty == 0:
            return None
        first, last = knobs.beta
        beta = last + (first - last) * (1 - (progress - knobs.warmup) / (1 - knobs.warmup))
        return knobs.penalty * (1 - (2 * self.share() - 1).abs().pow(beta)).sum()

    @torch.no_grad()
    def finish(self) -> tuple[Tensor, Params]:
        values = self._values((self.alpha >= 0).to(self.floor.dtype))
        return self.scheme.encode(values, {k: v.to(values.dtype) for k, v in self.params.items()}), self.params
