"""FlexRound: learns how to round by dividing every weight by a number of its own, together with the grid.

Lee, Kim, Kwon, Lee: FlexRound: Learnable Rounding based on Element-wise Division for Post-Training Quantization, ICML 2023,
arXiv 2306.00317, equations 2 and 3. (Only the divisor is learned a weight; LSQ learns the grid alone, AdaRound the direction alone.)

    S = s1 S2 s3 (s4),   r = W / S,   W_hat = s1 clip(rne(r), lo, hi)

s1 > 0 the grid (one a block of the scheme), S2 [O, I] > 0, s3 [O, 1] > 0, and for convolutions s4 > 0, one an input channel. Only s1 multiplies
back, so codes, s1 and the zero point are all that is stored. All factors are learned as logarithms d, from 0: ``s1 = s1_0 exp(d1)``; so learning
starts at round-to-nearest on the grid s1_0, bit for bit. Gradients pass straight through rne, and where clipping bites not at all: with
G = dL/dW_hat, m = 1[lo <= rne(r) <= hi], S' = S2 s3 s4,

    dL/dS' = -(W / S'^2) G m         proportional to |W|: large weights move over more steps (the "reciprocal rule")
    dL/dd2 = -s1 r G m;   dL/dd3, dL/dd4: its sums over rows, columns;   dL/dd1 = s1 sum_block G (q - m r)

s1 enters as it will be stored (rounded to the scale's storage type, gradients straight through), so that W_hat is always what a checkpoint
would decode to. Zero points stay. W = 0 stays 0 and signs never flip. Memory: 4 bytes a weight each for d2, its gradient, two moments of Adam,
W and r; with ``rank`` k (LRQ, arXiv 2407.11534) ``d2 = A B + c``, A [O, k], B [k, I], c [1, I], and k (O + I) + I instead of O I parameters.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dither.formats import Params, Scheme, WeightScheme
from dither.quant.rounding.soft import Levels, Softening, SoftRounding, Spread, effective, refuses_grid


@dataclass(frozen=True)
class Division(Softening):
    """FlexRound's parametrisation. ``learn_grid``: s1 is learned too, which is essential (with s1 fixed, straight-through steps often end
    above round-to-nearest). ``rank``: of a low-rank log S2; None: one entry a weight, as in the paper."""

    learn_grid: bool = True
    rank: int | None = None

    def __post_init__(self) -> None:
        if self.rank is not None and self.rank < 1:
            raise ValueError(f"rank must be at least 1 (None: full), not {self.rank}")

    def start(self, weight: Tensor, scheme: Scheme, params: Params, *, kernel: int = 1) -> Divided:
        return Divided(weight, scheme, params, learn_grid=self.learn_grid, rank=self.rank, kernel=kernel)

    def refuses(self, scheme: WeightScheme) -> str | None:
        return refuses_grid("FlexRound", scheme, floats=True)


class Divided(SoftRounding):
    """``W_hat`` as a function of d1 ``[R, C]``, d2 ``[O, I]`` (or A, B, c), d3 ``[O, 1]`` and, for convolutions, d4 ``[1, C_in]``."""

    def __init__(
        self, weight: Tensor, scheme: Scheme, params: Params, *, learn_grid: bool = True, rank: int | None = None, kernel: int = 1
    ) -> None:
        outputs, inputs = weight.shape
        new = weight.new_zeros
        self.scheme, self.params, self.kernel = scheme, params, kernel
        self.spread = Spread(scheme, outputs, inputs)
        self.levels = Levels(scheme, params, self.spread, weight.dtype)
        offset = self.levels.offset
        self.base = weight if offset is None else (self.spread.view(weight) - offset).reshape(weight.shape)
        self.scale0 = params["scale"].to(weight.dtype)
        self.d1 = new(self.spread.grid).requires_grad_(learn_grid)
        self.d3 = new(outputs, 1).requires_grad_()
        self.d4 = new(1, inputs // kernel).requires_grad_() if kernel > 1 else None
        self.d2 = new(outputs, inputs).requires_grad_() if rank is None else None
        self.low_rank: tuple[Tensor, Tensor, Tensor] | None = None
        if rank is not None:
            drawn = torch.randn(rank, inputs, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
            right = (drawn / rank**0.5).to(weight.device, weight.dtype).requires_grad_()
            self.low_rank = (new(outputs, rank).requires_grad_(), right, new(1, inputs).requires_grad_())

    def parameters(self) -> list[Tensor]:
        found = [self.d1, self.d3, *(self.low_rank or ())]
        found += [d for d in (self.d2, self.d4) if d is not None]
        return [d for d in found if d.requires_grad]

    def log_cells(self) -> Tensor:
        """``log S2 [O, I]``, and log s4 with it."""
        if self.d2 is not None:
            cells = self.d2
        else:
            assert self.low_rank is not None
            left, right, columns = self.low_rank
            cells = left @ right + columns
        return cells if self.d4 is None else cells + self.d4.repeat_interleave(self.kernel, 1)

    def weight(self, dtype: torch.dtype) -> Tensor:
        found: Tensor = _Divide.apply(self.log_cells(), self.d3, self.d1, self, dtype)  # type: ignore[no-untyped-call]
        return found

    @torch.no_grad()
    def finish(self) -> tuple[Tensor, Params]:
        kept, _ = effective(self.scale0 * self.d1.exp(), self.scheme, self.params)
        params = {**self.params, "scale": kept}
        return self.scheme.encode(self.weight(kept.dtype), {k: v.to(kept.dtype) for k, v in params.items()}), params


class _Divide(torch.autograd.Function):
    """Forward and gradients as in the file's head; everything is recomputed from r, the only matrix kept."""

    @staticmethod
    def forward(ctx: Any, cells: Tensor, rows: Tensor, d1: Tensor, soft: Divided, dtype: torch.dtype) -> Tensor:
        raw = soft.scale0 * d1.exp()
        scale = soft.spread.out(effective(raw, soft.scheme, soft.params)[1])
        ratio = (cells + rows).exp_()
        torch.div(soft.base, ratio, out=ratio)
        ratio = soft.spread.view(ratio).div_(scale)
        level, _ = soft.levels.nearest(ratio)
        ctx.save_for_backward(ratio, scale)
        ctx.soft = soft
        value = level.mul_(scale)
        if soft.levels.offset is not None:
            value = value.add_(soft.levels.offset)
        return value.reshape(soft.base.shape).to(dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        ratio, scale = ctx.saved_tensors
        soft: Divided = ctx.soft
        g = soft.spread.view(gradients[0].to(ratio.dtype))
        level, inside = soft.levels.nearest(ratio)
        passed = g * ratio
        passed.mul_(inside)  # G m r
        d1 = None
        if ctx.needs_input_grad[2]:
            # the stored scale stands for s1, whose gradient goes straight through; the global scale, if any, is within q's factor
            d1 = soft.spread.sum(level.mul_(g).sub_(passed)) * _multiplier(soft)
        cells = passed.mul_(scale).neg_().reshape(soft.base.shape)
        return cells, cells.sum(1, keepdim=True), d1, None, None


def _multiplier(soft: Divided) -> Tensor:
    """``ds1 / dd1 = s1`` before it is rounded to its storage type."""
    shared = soft.params.get("global_scale")
    raw = soft.scale0 * soft.d1.detach().exp()
    return raw if shared is None else raw * shared.to(raw.dtype)
