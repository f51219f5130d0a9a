"""What the calibration data says about the input of a layer: gathered once, shared by every part of a recipe.

For inputs ``x_t`` (t = 1..T tokens, padding left out):

    hessian   H = sum_t x_t x_t^T / T      [I, I] float64   (GPTQ eq. 1 up to a positive factor, which no result depends on)
    mean_abs  a = sum_t |x_t| / T          [I]    float32   (AWQ section 3.2)
    max_abs   max_t |x_t|                  [I]    float32
    mean      sum_t x_t / T                [I]    float64   (what a shift of the input does to H)
    rows      a fixed-size sample of x_t   [R, I] float32   (evenly strided over the stream, so it is deterministic)

Memory: 8 I^2 bytes for the Hessian, 4 R I bytes for the rows; time: T I^2 multiply-adds (half of I^2 T, by symmetry).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor, nn

from dither import kernels

T = TypeVar("T")
HESSIAN, MEAN, MEAN_ABS, MAX_ABS, ROWS = "hessian", "mean", "mean_abs", "max_abs", "rows"


@dataclass
class Statistics:
    """Running statistics of one input tensor ``[..., I]``, which may feed several layers."""

    features: int
    needs: frozenset[str]
    max_rows: int = 2048
    tokens: int = 0
    _gram: Tensor | None = None
    _sum: Tensor | None = None
    _sum_abs: Tensor | None = None
    _max_abs: Tensor | None = None
    _rows: list[Tensor] = field(default_factory=list)
    _stride: int = 1
    _finished: bool = False  # whether the Gram matrix was mirrored and divided: it takes no more rows then
    _derived: dict[Hashable, object] = field(default_factory=dict)

    @torch.no_grad()
    def update(self, x: Tensor) -> None:
        """Add the rows of ``x [T, I]`` (float32 or bfloat16). Raises ValueError where a row is not finite."""
        if x.shape[-1] != self.features:
            raise ValueError(f"statistics for {self.features} features were given an input of shape {tuple(x.shape)}")
        x = x.reshape(-1, self.features)
        if x.shape[0] == 0:
            return
        self._derived.clear()
        if self.needs & {MEAN_ABS, MAX_ABS}:
            magnitude = x.abs()
            if MEAN_ABS in self.needs:
                wide = magnitude.float()
                total = wide.T @ wide.new_ones(len(wide))  # a third of the time of torch's sum over rows
                self._sum_abs = total if self._sum_abs is None else self._sum_abs + total
            if MAX_ABS in self.needs:
                total = magnitude.amax(0).float()
                self._max_abs = total if self._max_abs is None else torch.maximum(self._max_abs, total)
            _refuse_unless_finite(total)
        if HESSIAN in self.needs:
            if self._finished:
                raise RuntimeError("statistics were read already; they take no more rows")
            if self._gram is None:
                self._gram = torch.zeros(self.features, self.features, dtype=torch.float64, device=x.device)
            if x.device.type == "cpu" and x.dtype in (torch.float32, torch.bfloat16):
                kernels.gram_update(self._gram, x.contiguous())
            else:
                self._gram += (x.T.float() @ x.float()).double() if x.dtype != torch.float64 else x.T @ x
        if not self.needs & {MEAN_ABS, MAX_ABS, HESSIAN}:  # nothing else would show it
            _refuse_unless_finite(torch.stack(x.aminmax()))
        if MEAN in self.needs:
            total = x.sum(0, dtype=torch.float64)
            self._sum = total if self._sum is None else self._sum + total
        if ROWS in self.needs:
            self._keep_rows(x)
        self.tokens += x.shape[0]

    def _keep_rows(self, x: Tensor) -> None:
        """Every ``stride``-th row of the whole stream; the stride doubles (and the kept rows thin out) when full."""
        first = -self.tokens % self._stride
        self._rows.append(x[first :: self._stride].to(torch.float32, copy=True))  # of its own: models may go on in place
        while sum(r.shape[0] for r in self._rows) > self.max_rows:
            self._stride *= 2
            self._rows = [torch.cat(self._rows)[::2].clone()]

    def check(self) -> None:
        """Raises ValueError where a row was not finite: a sum of squares is finite only where all of them are."""
        if self._gram is not None:
            _refuse_unless_finite(self._gram.diagonal(), ", or values whose squares are beyond float32")

    @property
    def hessian(self) -> Tensor:
        """``[I, I]`` float64, symmetric; not a copy: leave it as it is. KeyError where it was not asked for."""
        if self._gram is None:
            raise KeyError("the Hessian was not gathered for this layer")
        if not self._finished:
            kernels.gram_finish(self._gram)
            self._gram /= max(self.tokens, 1)
            self._finished = True
        return self._gram

    @property
    def mean_abs(self) -> Tensor:
        """``[I]`` float32."""
        if self._sum_abs is None:
            raise KeyError("mean |x| was not gathered for this layer")
        return self._sum_abs / max(self.tokens, 1)

    @property
    def max_abs(self) -> Tensor:
        """``[I]`` float32."""
        if self._max_abs is None:
            raise KeyError("max |x| was not gathered for this layer")
        return self._max_abs

    @property
    def rows(self) -> Tensor:
        """``[R, I]`` float32 sample of the inputs, R <= max_rows."""
        if not self._rows:
            raise KeyError("no input rows were kept for this layer")
        if len(self._rows) > 1:
            self._rows = [torch.cat(self._rows)]
        return self._rows[0]

    @property
    def has_hessian(self) -> bool:
        return self._gram is not None

    def derived(self, key: Hashable, make: Callable[[], T]) -> T:
        """What ``make()`` gives, made once for all layers that share these statistics (and anew after they change)."""
        if key not in self._derived:
            self._derived[key] = make()
        return self._derived[key]  # type: ignore[return-value]

    def rescale(self, scale: Tensor) -> None:
        """Account for a scale ``s [I]`` folded in front of the layer: from now on the statistics are those of ``x / s``. A convolution takes
        ``[C]``, one for each of its channels."""
        self._derived.clear()
        inverse = 1 / self._by_column(scale)
        if self._gram is not None:
            gram = self.hessian
            gram *= inverse.double()
            gram *= inverse.double()[:, None]
        if self._sum_abs is not None:
            self._sum_abs = self._sum_abs * inverse
        if self._max_abs is not None:
            self._max_abs = self._max_abs * inverse
        if self._sum is not None:
            self._sum = self._sum * inverse.double()
        self._rows = [rows * inverse for rows in self._rows]

    def shift(self, delta: Tensor) -> None:
        """Account for a shift ``delta [I]`` (``[C]`` of a convolution) folded in front of the layer: from now on the statistics are those of
        ``x - delta``. Magnitudes are forgotten, since they do not follow from those of x. KeyError where there is a Hessian and the mean was
        not asked for."""
        self._derived.clear()
        delta = self._by_column(delta)
        d = delta.double()
        if self._gram is not None:
            if self._sum is None:
                raise KeyError("the mean was not gathered for this layer")
            gram, mean = self.hessian, self._sum / max(self.tokens, 1)
            gram -= torch.outer(mean, d) + torch.outer(d, mean) - torch.outer(d, d)
        if self._sum is not None:
            self._sum = self._sum - self.tokens * d
        self._sum_abs = self._max_abs = None
        self._rows = [rows - delta for rows in self._rows]

    def _by_column(self, values: Tensor) -> Tensor:
        """``[C]`` -> ``[I]``: patches of a convolution hold the k places under its kernel channel by channel."""
        return values.repeat_interleave(self.features // values.numel())

    def gram_blocks(self, group_size: int) -> list[Tensor]:
        """The diagonal blocks ``G_k = sum_t x_k x_k^T / T`` of the groups: ``[G, n, n]`` float32 of the full groups, ``[1, r, r]`` of a shorter
        last one. KeyError where neither Hessian nor rows were asked for."""
        if self._gram is None:
            return gram_blocks(self.rows, group_size)
        found = []
        for first, last, size in _groups(self.features, group_size):
            h = self.hessian[first:last, first:last]
            found.append(torch.stack([h[k : k + size, k : k + size] for k in range(0, last - first, size)]).float())
        return found

    def power(self) -> Tensor:
        """Mean of ``x^2`` of each input, ``[I]`` float32: the Hessian's diagonal, or its estimate from the kept rows."""
        if self._gram is not None:
            return self.hessian.diagonal().float()
        return self.rows.square().mean(0)


def _refuse_unless_finite(total: Tensor, more: str = "") -> None:
    if not bool(torch.isfinite(total).all()):
        raise ValueError(f"the layer's input holds NaN or inf{more}")


def gram_blocks(rows: Tensor, group_size: int) -> list[Tensor]:
    """``rows [R, I]`` -> as `Statistics.gram_blocks`."""
    found = []
    for first, last, size in _groups(rows.shape[1], group_size):
        x = rows[:, first:last].reshape(len(rows), -1, size)  # (R, G, n)
        found.append(torch.einsum("tgi,tgj->gij", x, x) / len(rows))
    return found


def _groups(features: int, size: int) -> Iterator[tuple[int, int, int]]:
    """(first, last, size) of the stretch of full groups and of that of a shorter last group."""
    full = features // size * size
    if full:
        yield 0, full, size
    if full < features:
        yield full, features, features - full


def layer_input(module: nn.Module, x: Tensor, mask: Tensor | None) -> Tensor:
    """The rows ``[T, I]`` that a layer multiplies its flattened weight with: of a linear layer the tokens that ``mask [B, T]`` keeps, of a
    convolution (of one group) the unfolded patches ``[positions, C * k...]``."""
    if isinstance(module, nn.Conv1d | nn.Conv2d):
        return _patches(module, x).flatten(0, 1)
    if mask is not None and x.shape[: mask.dim()] == mask.shape:
        return x[mask]
    return x.reshape(-1, x.shape[-1])


def slice_inputs(module: nn.Module, x: Tensor, mask: Tensor | None) -> list[Tensor]:
    """The rows ``[T, I]`` that each slice of a layer's weight is multiplied with: a grouped convolution has one a group, any other layer one."""
    if isinstance(module, nn.Conv1d | nn.Conv2d) and module.groups > 1:
        patches = _patches(module, x)  # channel by channel, so group by group
        return [part.flatten(0, 1) for part in patches.chunk(module.groups, -1)]
    return [layer_input(module, x, mask)]


def _patches(module: nn.Conv1d | nn.Conv2d, x: Tensor) -> Tensor:
    """``[B, positions, C * k...]``: what lies under the kernel at each position."""
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    batched = x.dim() == len(module.kernel_size) + 2
    x = nn.functional.pad(x if batched else x[None], module._reversed_padding_repeated_twice, mode=mode)
    flat = isinstance(module, nn.Conv1d)  # unfolded as an image of one row

    def both(size: tuple[int, ...]) -> tuple[int, ...]:
        return (1, *size) if flat else size

    x = x.unsqueeze(2) if flat else x
    columns = nn.functional.unfold(x, both(module.kernel_size), dilation=both(module.dilation), stride=both(module.stride))
    return columns.transpose(1, 2)  # from (B, C * k, positions)
