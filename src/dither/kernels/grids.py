"""Column grids: the values that each weight of a matrix ``[O, I]`` may take, as the GPTQ loop needs them.

A weight in row ``o`` and column group ``g`` has the scale ``s = scale[o, g]`` and one of three rules (``w`` the weight,
``u`` its code):

    AffineGrid   u = clip(rne(w / s) + z, 0, code_max)      value = s (u - z)      integer zero point z
    OffsetGrid   u = clip(rne((w - m) / s), 0, code_max)    value = s u + m        float offset m
    TableGrid    u = codes[argmin_i |w / s - table[i]|]     value = s table[i]     small floats, codebooks
    MixedGrid    where binary: u = (w >= mu)                value = mu + alpha (2 u - 1)   two levels; elsewhere as AffineGrid

``rne`` rounds half to even; a tie between table entries goes to the even code. Arithmetic is in the weight's dtype, one
rounding an operation, so that codes are the same wherever they are computed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dither.kernels.checks import check

_FLOATS = (torch.float32, torch.float64)


@dataclass(frozen=True, eq=False)
class AffineGrid:
    """``scale`` and ``zero`` are ``[O, G]``; codes run from 0 to ``code_max`` <= 255."""

    scale: Tensor
    zero: Tensor
    code_max: int

    def encode(self, w: Tensor, group: Tensor | int) -> Tensor:
        """Codes, uint8, of ``w [O, n]`` whose columns are in ``group [n]`` (or of ``w [O]`` in one group)."""
        zero = self.zero[:, group]
        return (torch.round(w / self.scale[:, group]) + zero).clamp_(0, self.code_max).to(torch.uint8)

    def decode(self, codes: Tensor, group: Tensor | int) -> Tensor:
        """Values of ``codes``, in the dtype of ``scale``."""
        return self.scale[:, group] * (codes.to(self.scale.dtype) - self.zero[:, group])

    def to(self, dtype: torch.dtype) -> AffineGrid:
        return replace(self, scale=self.scale.to(dtype).contiguous(), zero=self.zero.to(dtype).contiguous())

    def check(self, rows: int) -> None:
        check_scale(self.scale, rows)
        check("zero", self.zero, tuple(self.scale.shape), _FLOATS)
        check_code_max(self.code_max)


@dataclass(frozen=True, eq=False)
class OffsetGrid:
    """``scale`` and ``offset`` are ``[O, G]``; codes run from 0 to ``code_max`` <= 255."""

    scale: Tensor
    offset: Tensor
    code_max: int

    def encode(self, w: Tensor, group: Tensor | int) -> Tensor:
        """Codes, uint8, of ``w [O, n]`` whose columns are in ``group [n]`` (or of ``w [O]`` in one group)."""
        steps = (w - self.offset[:, group]) / self.scale[:, group]
        return torch.round(steps).clamp_(0, self.code_max).to(torch.uint8)

    def decode(self, codes: Tensor, group: Tensor | int) -> Tensor:
        """Values of ``codes``, in the dtype of ``scale``."""
        return self.scale[:, group] * codes.to(self.scale.dtype) + self.offset[:, group]

    def to(self, dtype: torch.dtype) -> OffsetGrid:
        return replace(self, scale=self.scale.to(dtype).contiguous(), offset=self.offset.to(dtype).contiguous())

    def check(self, rows: int) -> None:
        check_scale(self.scale, rows)
        check("offset", self.offset, tuple(self.scale.shape), _FLOATS)
        check_code_max(self.code_max)


@dataclass(frozen=True, eq=False)
class TableGrid:
    """``scale [O, G]``; ``table [N]`` strictly ascending, N <= 256; ``codes [N]`` uint8, what is stored for each entry.
    """

    scale: Tensor
    table: Tensor
    codes: Tensor

    def encode(self, w: Tensor, group: Tensor | int) -> Tensor:
        """Codes, uint8, of ``w [O, n]`` whose columns are in ``group [n]`` (or of ``w [O]`` in one group)."""
        return self.codes[torch.searchsorted(self.edges(), (w / self.scale[:, group]).contiguous(), right=True)]

    def decode(self, codes: Tensor, group: Tensor | int) -> Tensor:
        """Values of ``codes``, in the dtype of ``scale``."""
        by_code = self.table.new_zeros(256)
        by_code[self.codes.long()] = self.table
        return self.scale[:, group] * by_code[codes.long()]

    def edges(self) -> Tensor:
        """``[N - 1]``: entry ``i + 1`` is the nearest one from ``edges[i]`` on, up to ``edges[i + 1]``.

        The least numbers of the table's dtype above the midpoints, or at them where a tie goes up.
        """
        exact = self.table.double()
        middle = (exact[:-1] + exact[1:]) / 2
        even = self.codes % 2 == 0
        index_even = torch.arange(len(exact), device=exact.device) % 2 == 0
        tie_up = torch.where(even[1:] == even[:-1], index_even[1:], even[1:])
        edge = middle.to(self.table.dtype)
        past = torch.nextafter(edge, torch.full_like(edge, torch.inf))
        return torch.where((edge.double() < middle) | ((edge.double() == middle) & ~tie_up), past, edge)

    def to(self, dtype: torch.dtype) -> TableGrid:
        return replace(self, scale=self.scale.to(dtype).contiguous(), table=self.table.to(dtype).contiguous())

    def check(self, rows: int) -> None:
        check_scale(self.scale, rows)
        check("table", self.table, (None,), _FLOATS)
        check("codes", self.codes, (len(self.table),), (torch.uint8,))
        if not 1 <= len(self.table) <= 256 or not bool((self.table[1:] > self.table[:-1]).all()):
            raise ValueError(f"table: must be 1 .. 256 strictly ascending values, not {self.table.tolist()}")
        if not bool(torch.isfinite(self.table).all()):
            raise ValueError("table: holds NaN or inf")


@dataclass(frozen=True, eq=False)
class MixedGrid:
    """Two grids in one matrix: two levels ``mu +- alpha`` where ``binary [O, I]`` (bool, columns in the order of the
    weights), an affine grid elsewhere. ``scale``, ``zero``, ``alpha`` and ``mu`` are ``[O, G]``.
    """

    scale: Tensor
    zero: Tensor
    code_max: int
    alpha: Tensor
    mu: Tensor
    binary: Tensor

    def at(self, column: int) -> MixedGrid:
        """The grid of one column alone, for weights ``[O]``."""
        return replace(self, binary=self.binary[:, column])

    def encode(self, w: Tensor, group: Tensor | int) -> Tensor:
        """Codes, uint8, of ``w [O, I]`` whose columns are in ``group [I]`` (of ``w [O]`` in one group after `at`)."""
        affine = AffineGrid(self.scale, self.zero, self.code_max).encode(w, group)
        return torch.where(self.binary, (w >= self.mu[:, group]).to(torch.uint8), affine)

    def decode(self, codes: Tensor, group: Tensor | int) -> Tensor:
        """Values of ``codes``, in the dtype of ``scale``."""
        affine = AffineGrid(self.scale, self.zero, self.code_max).decode(codes, group)
        alpha, mu = self.alpha[:, group], self.mu[:, group]
        return torch.where(self.binary, torch.where(codes > 0, mu + alpha, mu - alpha), affine)

    def levels(self) -> Tensor:
        """``[O, 3 G]``: threshold, lower and upper value of each group's two levels, as the kernel reads them."""
        return torch.stack([self.mu, self.mu - self.alpha, self.mu + self.alpha], 2).flatten(1).contiguous()

    def to(self, dtype: torch.dtype) -> MixedGrid:
        found = {name: getattr(self, name).to(dtype).contiguous() for name in ("scale", "zero", "alpha", "mu")}
        return replace(self, **found)

    def check(self, rows: int) -> None:
        check_scale(self.scale, rows)
        for name in ("zero", "alpha", "mu"):
            check(name, getattr(self, name), tuple(self.scale.shape), _FLOATS)
        for name in ("alpha", "mu"):
            if not bool(torch.isfinite(getattr(self, name)).all()):
                raise ValueError(f"{name}: holds NaN or inf")
        check("binary", self.binary, (rows, None), (torch.bool,))
        check_code_max(self.code_max)


ColumnGrid = AffineGrid | OffsetGrid | TableGrid | MixedGrid


def check_scale(scale: Tensor, rows: int) -> None:
    check("scale", scale, (rows, None), _FLOATS)
    if not bool(((scale != 0) & torch.isfinite(scale)).all()):
        raise ValueError("scale: holds a zero, NaN or inf")


def check_code_max(code_max: int) -> None:
    if not 1 <= code_max <= 255:
        raise ValueError(f"code_max: must be 1 .. 255, not {code_max}")
