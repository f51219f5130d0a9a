"""Products of packed weights with rows that are rounded to integers as they arrive, each on a grid of its own, in int32 (W4A8, W8A8 and the like).

    x_hat[t, i] = s[t] (q[t, i] - z[t])                                                            `TokenGrid` says which s, z, q
    y[t, o] = s[t] sum_g scale[o, g] sum_{i in g} (code[o, i] - zero[o, g]) (q[t, i] - z[t]),   g = i // group

The inner sums are integers and exact; the outer one is float32, in the order of the groups. So it is x_hat W_hat^T up to 2 G + 1 roundings, and a row
of y is the same to the last bit whatever rows come with it, on however many threads. Up to 8 rows read the codes once, ``bits / 8`` bytes a weight;
more rows meet panels of codes that are unpacked to bytes. Four products of a lane are one operation where the processor has AVX512_VNNI and VBMI.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dither.kernels.checks import check, check_bits, check_finite
from dither.kernels.extension import extension, isa, threads
from dither.kernels.int8_matmul_reference import int8_matmul_reference
from dither.kernels.packed_matmul import SCALES, WIDE_SCALES, check_weights
from dither.kernels.round import SCALE_TYPES

GRIDS = ("symmetric", "extremum", "asymmetric")  # in the order of csrc/int8_matmul.hpp
MOST_COLUMNS = (2**31 - 1) // 255**2  # of a group whose sums an int32 holds


@dataclass(frozen=True)
class TokenGrid:
    """How a row of x is rounded: to integers of ``bits`` bits on min-max grids, the conventions of `dither.formats.Int`. ``scale``: what the scale is
    stored in, which it is rounded to before use.

        sym="restricted"    s = max|x| / K          q in -K .. K,  K = 2^(bits - 1) - 1
        sym="full"          s = 2 max|x| / N        q in -2^(bits - 1) .. 2^(bits - 1) - 1,  N = 2^bits - 1
        sym="extremum"      s = x_e / -2^(bits-1)   likewise; x_e the largest entry, with its sign
        sym=False           s = (hi - lo) / N       q in 0 .. N, z = clip(rne(-lo / s), 0, N);  lo = min(x, 0), hi = max(x, 0)
    """

    bits: int = 8
    sym: str | bool = "restricted"
    scale: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        check_bits(self.bits)
        if self.sym is not False and self.sym not in ("restricted", "full", "extremum"):
            raise ValueError(f"sym: must be 'restricted', 'full', 'extremum' or False, not {self.sym!r}")
        if self.sym == "restricted" and self.bits == 1:
            raise ValueError("bits: must be at least 2 where sym is 'restricted'")
        if self.scale not in SCALE_TYPES:
            raise ValueError(f"scale: must be torch.float16, torch.bfloat16 or torch.float32, not {self.scale}")

    @property
    def middle(self) -> int:
        return 1 << self.bits - 1

    @property
    def kind(self) -> str:
        return "asymmetric" if self.sym is False else "extremum" if self.sym == "extremum" else "symmetric"

    @property
    def divisor(self) -> float:
        """The scale is the range of a row over this."""
        code_max = float((1 << self.bits) - 1)
        return {False: code_max, "restricted": self.middle - 1.0, "full": code_max / 2, "extremum": float(self.middle)}[self.sym]

    @property
    def lowest(self) -> int:
        """Of q, on symmetric grids."""
        return 1 - self.middle if self.sym == "restricted" else -self.middle


def int8_matmul(x: Tensor, packed: Tensor, bits: int, scale: Tensor, zero: Tensor | int, group: int, grid: TokenGrid) -> Tensor:
    """``x [T, I]`` float32 or bfloat16, ``packed [O, stride]`` uint8 (see `dither.kernels.packing`) -> ``[T, O]`` in the type of x.

    ``scale [O, ceil(I / group)]`` float32, float16 or bfloat16; ``zero`` of that shape, uint8, or one code for all. No gradients. Raises ValueError
    for other shapes, dtypes, widths and strides, for NaN and inf in x, and for groups of more than `MOST_COLUMNS` columns.
    """
    check("x", x, (None, None), (torch.float32, torch.bfloat16))
    return Int8Matrix(packed, bits, scale, zero, group, x.shape[1], grid)(x)


class Int8Matrix:
    """The weights of `int8_matmul`, checked once. They are not copied: what changes in them changes the products."""

    def __init__(self, packed: Tensor, bits: int, scale: Tensor, zero: Tensor | int, group: int, columns: int, grid: TokenGrid) -> None:
        if min(group, columns) > MOST_COLUMNS:
            raise ValueError(f"group: must be 1 .. {MOST_COLUMNS} columns, for sums in int32, not {group}")
        check_weights(packed, bits, scale, zero, group, columns, WIDE_SCALES)
        if not isinstance(zero, Tensor) and (not 0 <= zero <= 255 or zero != int(zero)):
            raise ValueError(f"zero: must be a code, 0 .. 255, not {zero}")
        self.packed, self.bits, self.scale, self.zero, self.group, self.columns = packed.detach(), bits, scale.detach(), zero, group, columns
        self.grid, self._rows = grid, packed.shape[0]
        zeros = zero if isinstance(zero, Tensor) else None
        self._weights = (
            self.packed.data_ptr(), self._rows, columns, bits, self.scale.data_ptr(), SCALES[scale.dtype],
            0 if zeros is None else zeros.data_ptr(), 0 if isinstance(zero, Tensor) else int(zero), group,
            GRIDS.index(grid.kind), grid.divisor, float(grid.lowest), float(grid.middle - 1), grid.middle, SCALE_TYPES.index(grid.scale),
        )  # fmt: skip

    def __call__(self, x: Tensor) -> Tensor:
        """``x [T, I]``, dense, float32 or bfloat16 -> ``[T, O]``. ValueError where it is something else, holds NaN or inf, or wants a gradient."""
        y, finite = self.multiply(x)
        if not finite:
            check_finite("x", x)
        return y

    def multiply(self, x: Tensor) -> tuple[Tensor, bool]:
        """The same without an error for NaN and inf: y, where such rows are NaN, and whether there are none."""
        if x.dim() != 2 or x.shape[1] != self.columns or x.dtype not in (torch.float32, torch.bfloat16) or not x.is_contiguous():
            check("x", x, (None, self.columns), (torch.float32, torch.bfloat16))
        if x.requires_grad and torch.is_grad_enabled():
            raise ValueError("x: products with packed weights have no gradient; decode the weights first")
        native = extension() if x.device.type == "cpu" else None
        if native is None:
            y = int8_matmul_reference(x, self.packed, self.bits, self.scale, self.zero, self.group, self.grid)
            return y, bool(torch.isfinite(x).all())
        y = torch.empty(x.shape[0], self._rows, dtype=x.dtype)
        if not self.columns:
            return y.zero_(), True
        finite = native.int8_matmul(*self._weights, x.data_ptr(), x.shape[0], x.dtype == torch.bfloat16, y.data_ptr(), 0, isa(), threads())
        return y, finite
