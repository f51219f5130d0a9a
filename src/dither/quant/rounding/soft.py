"""Soft roundings: a rounded weight as a differentiable function of parameters that gradients move.

A `Softening` is a record of knobs; ``start(weight, scheme, params)`` opens one weight, as a `SoftRounding`:

    parameters()       what Adam moves
    weight(dtype)      W_hat [O, I], with gradients (straight through the rounding, or through a relaxed one)
    regulariser(p)     what is added to the objective at progress p in [0, 1], where a relaxation has to be driven to whole codes
    finish()           codes [O, I] and grid parameters as they are stored

Whoever learns them minimises a *normalised* objective

    J = N loss / loss_0 + regulariser,       N = number of weights, loss_0 = the loss of the start

so that a weight's share of the loss is about 1: Adam's steps do not depend on the factor, but its epsilon and any penalty a weight do.
Learners: `learned` (one layer, its Hessian), `reconstruct` (a block, its outputs).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dither.formats import Float, Int, Params, Scheme, WeightScheme
from dither.formats.scales import stored


class SoftRounding(ABC):
    """One weight on its way to whole codes."""

    @abstractmethod
    def parameters(self) -> list[Tensor]:
        """Leaves that require gradients, float32 (float64 for float64 weights)."""

    @abstractmethod
    def weight(self, dtype: torch.dtype) -> Tensor:
        """``W_hat [O, I]``, computed in the weight's own type and cast once."""

    def regulariser(self, progress: float) -> Tensor | None:
        """Added to the normalised objective; None where there is nothing to add."""
        return None

    @abstractmethod
    def finish(self) -> tuple[Tensor, Params]:
        """Codes uint8 ``[O, I]`` and grid parameters, scales rounded to their storage type."""


class Softening(ABC):
    """Base of the kinds of soft rounding: frozen dataclasses of knobs."""

    @abstractmethod
    def start(self, weight: Tensor, scheme: Scheme, params: Params, *, kernel: int = 1) -> SoftRounding:
        """``weight [O, I]`` on the grid ``params``; rounding it there to the nearest point is where learning starts. ``kernel``: neighbouring
        inputs that belong to one input channel (positions of a convolution's kernel)."""

    @abstractmethod
    def refuses(self, scheme: WeightScheme) -> str | None:
        """Why it cannot learn codes of ``scheme``; None where it can."""


def refuses_grid(what: str, scheme: WeightScheme, *, floats: bool) -> str | None:
    """The refusals that all soft roundings share: no grid, less than 2 or more than 8 bits, floats where only whole numbers will do."""
    if not isinstance(scheme, Scheme):
        return f"{what} learns codes on grids of numbers, not {scheme}"
    if not isinstance(scheme.format, Int | Float if floats else Int):
        return f"{what} learns codes of {'integers and small floats' if floats else 'integers'}, not of {scheme.format}"
    if not 2 <= scheme.format.bits <= 8:
        return f"bits must be 2 to 8 for {what}, not {scheme.format.bits}"
    return None


class Spread:
    """How parameters ``[R, C]`` lie over a matrix ``[O, I]``: the matrix is seen as ``[O, C', n]``, the parameters as ``[1 or O, C', 1]``.

    Groups that divide the row need no copy; a ragged last group and blocks of several rows are spread by an index.
    """

    def __init__(self, scheme: Scheme, outputs: int, inputs: int) -> None:
        rows, columns = scheme.blocks.grid_shape(outputs, inputs)
        regular = columns == 1 or (inputs % columns == 0 and inputs // columns == scheme.blocks.columns(inputs))
        self.grid = (rows, columns)
        self.shape = (outputs, columns, inputs // columns) if regular else (outputs, inputs, 1)
        self._columns = None if regular else scheme.blocks.column_groups(inputs)
        self._rows = None if rows in (1, outputs) else scheme.blocks.row_groups(outputs)

    def view(self, matrix: Tensor) -> Tensor:
        """``[O, I]`` (or ``[O, 1]``) -> ``[O, C', n]``."""
        return matrix.reshape(self.shape)

    def out(self, grid: Tensor) -> Tensor:
        """Parameters ``[R, C]`` -> ``[1 or O, C', 1]``."""
        if self._columns is not None:
            grid = grid[:, self._columns.to(grid.device)]
        if self._rows is not None:
            grid = grid[self._rows.to(grid.device)]
        return grid.unsqueeze(-1)

    def sum(self, values: Tensor) -> Tensor:
        """``[O, C', n]`` -> ``[R, C]``: the sum over each block, the adjoint of `out`."""
        total = values.sum(-1)  # (O, C')
        if self.grid[0] == 1 and self.shape[0] > 1:
            total = total.sum(0, keepdim=True)
        elif self._rows is not None:
            total = total.new_zeros(self.grid[0], total.shape[1]).index_add_(0, self._rows.to(total.device), total)
        if self._columns is not None:
            total = total.new_zeros(total.shape[0], self.grid[1]).index_add_(1, self._columns.to(total.device), total)
        return total


class Levels:
    """What the codes of a grid name, in units of the scale: ``w_hat = s l + m`` with levels l, where only float offsets have an m.

    Integers: l = -z .. N - z (lo and hi, one a block where z differs). Floats: the format's own values.
    """

    def __init__(self, scheme: Scheme, params: Params, spread: Spread, dtype: torch.dtype) -> None:
        form = scheme.format
        self.format = form
        self.offset: Tensor | None = None
        self.zero: Tensor | float = 0.0
        if isinstance(form, Float):
            values = form.values()[0]
            top = float(values[-1])
            self.reach = top + (top - float(values[-2])) / 2  # beyond it a value is clipped
            return
        assert isinstance(form, Int)
        if form.sym:
            self.zero = float(1 << (form.bits - 1))
        elif form.zero == "int":
            self.zero = spread.out(params["zero_point"].to(dtype))
        else:
            self.offset = spread.out(params["offset"].to(dtype))
        self.lo: Tensor | float = (1.0 if form.sym == "restricted" else 0.0) - self.zero
        self.hi: Tensor | float = form.code_max - self.zero

    def nearest(self, ratio: Tensor) -> tuple[Tensor, Tensor]:
        """The level next to ``ratio [O, C', n]`` (ties to even, clipped), and where nothing was clipped: lo <= rne(r) <= hi."""
        if isinstance(self.format, Float):
            return self.format.quantize(ratio, {"scale": ratio.new_ones(ratio.shape[:-1])}), ratio.abs() <= self.reach
        whole = ratio.round()
        level = self.clip(whole)
        return level, level == whole

    def clip(self, x: Tensor) -> Tensor:
        """Whole numbers, or what is between them, into the range. Integers only."""
        lo, hi = self.lo, self.hi
        return torch.clamp(x, lo, hi) if isinstance(lo, Tensor) and isinstance(hi, Tensor) else torch.clamp(x, float(lo), float(hi))


def effective(scale: Tensor, scheme: Scheme, params: Params) -> tuple[Tensor, Tensor]:
    """A scale ``[R, C]`` that gradients have moved -> (as it is stored, what codes are multiplied with). They differ by a global scale."""
    kept = stored(scale, scheme.format.scale)  # type: ignore[attr-defined]
    shared = params.get("global_scale")
    return kept, kept if shared is None else kept * shared.to(kept.dtype)


class Descent:
    """Adam (betas 0.9, 0.999, eps 1e-8, no decay) under a cosine from ``lr`` to 0 over ``steps``."""

    def __init__(self, parameters: Sequence[Tensor], lr: float, steps: int) -> None:
        if not lr > 0 or not math.isfinite(lr):
            raise ValueError(f"lr must be positive, not {lr}")
        if steps < 1:
            raise ValueError(f"steps must be at least 1, not {steps}")
        fused = all(p.device.type in ("cpu", "cuda") for p in parameters)
        self.lr, self.steps, self.taken = lr, steps, 0
        self.adam = torch.optim.Adam(list(parameters), lr=lr, fused=fused)

    @property
    def progress(self) -> float:
        """Share of the steps that were taken."""
        return self.taken / self.steps

    def step(self) -> None:
        """Move the parameters along their gradients, and forget these."""
        for group in self.adam.param_groups:
            group["lr"] = self.lr * 0.5 * (1 + math.cos(math.pi * self.progress))
        self.adam.step()
        self.adam.zero_grad(set_to_none=True)
        self.taken += 1


@dataclass
class Kept:
    """The best codes seen: ``codes [O, I]`` uint8 and ``params`` of each weight, their loss, and the step that they come from."""

    states: dict[str, tuple[Tensor, Params]]
    loss: float
    step: int = 0

    def offer(self, states: dict[str, tuple[Tensor, Params]], loss: float, step: int, *, always: bool = False) -> None:
        """Take what is better (or, ``always``, what is finite)."""
        if math.isfinite(loss) and (always or loss < self.loss):
            self.states, self.loss, self.step = states, loss, step


class Diverged(FloatingPointError):
    """The loss stopped being finite. ``kept``: the last good iterate."""

    def __init__(self, where: str, step: int, kept: Kept) -> None:
        super().__init__(f"{where}: the loss is not finite at step {step}; lower lr (the best iterate was step {kept.step})")
        self.kept = kept


def into_cells(weight: Tensor, codes: Tensor, scheme: Scheme, params: Params, margin: float = 0.05) -> Tensor:
    """``weight [O, I]`` moved as little as possible such that its nearest codes on ``params`` are ``codes``, with ``margin`` steps to spare:
    how learning starts from what another rounding chose."""
    spread = Spread(scheme, *weight.shape)
    kept = {k: v.to(weight.dtype) for k, v in params.items()}
    centre = scheme.decode(codes, kept)
    reach = (0.5 - margin) * spread.out(effective(kept["scale"], scheme, kept)[1]).abs()
    moved = torch.clamp(spread.view(weight), spread.view(centre) - reach, spread.view(centre) + reach).reshape(weight.shape)
    moved = torch.where(scheme.encode(weight, kept) == codes, weight, moved)
    return torch.where(scheme.encode(moved, kept) == codes, moved, centre)
