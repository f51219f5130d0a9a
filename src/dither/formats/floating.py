"""Small floating-point formats: one sign bit, E exponent bits, M mantissa bits, up to 8 bits together.

    value = (-1)^s 2^(e - bias) (1 + m / 2^M)  for e > 0;   (-1)^s 2^(1 - bias) m / 2^M  for e = 0;   bias = 2^(E-1) - 1

``finite=True`` (e2m1, e3m2, e2m3, and e4m3 as machine learning uses it): no infinities; formats of 8 bits keep one NaN code per sign, all ones,
formats below 8 bits have none. ``nan=False``: that code is a number too (LLM-FP4: e4m3 up to 480 instead of 448, e1m6 with 127 equal steps).
``finite=False`` (e5m2): the largest exponent is infinity and NaN, as in IEEE 754. Neither is ever produced: values beyond the largest go to
the largest. Ties round to the even mantissa. A code is the bit pattern itself.
OCP Microscaling Formats v1.0 and OCP 8-bit Floating Point v1.0 give the tables that the tests compare with.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from dither.formats import scales
from dither.formats.format import Format, Params, as_like, expand
from dither.kernels import ColumnGrid, TableGrid


@lru_cache(maxsize=64)
def _tables(exponent: int, mantissa: int, finite: bool, nan: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Non-negative values (rising, float64), the midpoints between them, and for each midpoint whether a tie goes up."""
    bias = 2 ** (exponent - 1) - 1 if exponent > 0 else 0
    count = 1 << (exponent + mantissa)
    if not finite:
        count -= 1 << mantissa  # the top exponent is inf and NaN
    elif nan and exponent + mantissa == 7:
        count -= 1  # all ones is NaN
    values = []
    for code in range(count):
        e, m = code >> mantissa, code & ((1 << mantissa) - 1)
        values.append(2.0 ** (e - bias) * (1 + m / 2**mantissa) if e else 2.0 ** (1 - bias) * m / 2**mantissa)
    table = torch.tensor(values, dtype=torch.float64)
    middle = (table[1:] + table[:-1]) / 2
    up = torch.arange(count - 1) % 2 == 1  # between codes k and k + 1 a tie takes the even one
    return table, middle, up


@dataclass(frozen=True)
class Float(Format):
    """``Float(2, 1)``: e2m1, scaled by each block's maximum. Raises ValueError for widths that make no format."""

    exponent: int
    mantissa: int
    finite: bool = True
    scale: str = "float16"
    nan: bool = True  # whether a finite format of 8 bits keeps a NaN code; the others have none

    def __post_init__(self) -> None:
        if any(type(n) is not int for n in (self.exponent, self.mantissa)) or any(type(b) is not bool for b in (self.finite, self.nan)):
            raise ValueError(f"exponent and mantissa must be whole numbers, finite and nan true or false, not {self!r}")
        if self.exponent < 1 or self.mantissa < 0 or 1 + self.exponent + self.mantissa > 8:
            raise ValueError(
                f"a float of 1 sign, {self.exponent} exponent and {self.mantissa} mantissa bits is none of up to 8 bits"
            )
        if not self.finite and (self.exponent < 2 or self.mantissa < 1):
            raise ValueError("finite=False needs an exponent to spare (2 bits or more) and a mantissa (1 bit or more)")
        if self.exponent + self.mantissa == 7 and self.finite and self.nan and self.mantissa == 0:
            raise ValueError("e7m0 with a NaN code: use nan=False or fewer bits")
        if not self.finite and not self.nan:
            raise ValueError("nan=False needs finite=True: an infinite format has NaN codes beside infinity")
        scales.check(self.scale)

    @property
    def bits(self) -> int:  # type: ignore[override]
        return 1 + self.exponent + self.mantissa

    @property
    def _tables(self) -> tuple[Tensor, Tensor, Tensor]:
        return _tables(self.exponent, self.mantissa, self.finite, self.nan)

    @property
    def largest(self) -> float:
        """Largest finite value."""
        return float(self._tables[0][-1])

    def values(self) -> tuple[Tensor, Tensor]:
        """All finite values, rising (float64, without -0), and their codes (uint8)."""
        positive = self._tables[0]
        codes = torch.arange(len(positive))
        sign = 1 << (self.exponent + self.mantissa)
        return torch.cat([-positive[1:].flip(0), positive]), torch.cat([(codes[1:] + sign).flip(0), codes]).to(
            torch.uint8
        )

    def table(self) -> Tensor:
        """``[2^bits]`` float32: what each code means under a scale of 1. Codes of infinity and NaN, which are never written, mean the largest."""
        return _named(self)

    def range(self, x: Tensor) -> tuple[Tensor, Tensor]:
        peak = x.abs().amax(-1) if x.shape[-1] else x.new_zeros(x.shape[:-1])
        return -peak, peak

    def params(self, lo: Tensor, hi: Tensor, shared: Params | None = None) -> Params:
        found = dict(shared or {})
        scale = torch.where(hi > 0, hi / self.largest, torch.ones_like(hi))
        if "global_scale" in found:
            scale = torch.where(hi > 0, scale / found["global_scale"], torch.ones_like(hi))
        step = self.largest - float(self._tables[0][-2])
        found["scale"] = scales.stored(scale, self.scale, 1 + step / 2 / self.largest)
        return found

    def shared(self, x: Tensor) -> Params:
        """NVFP4's second scale: such that the largest block scale is e4m3's largest number, 448."""
        if self.scale != "e4m3":
            return {}
        peak = x.abs().amax().float() if x.numel() else torch.ones(())
        return {"global_scale": (peak / (448.0 * self.largest)).clamp(min=2.0**-100)}

    @staticmethod
    def effective(params: Mapping[str, Tensor]) -> Tensor:
        """The scale of each block, that of the whole tensor included."""
        return params["scale"] * params["global_scale"] if "global_scale" in params else params["scale"]

    def _index(self, x: Tensor) -> Tensor:
        """Index of the nearest non-negative value for each ``|x|``."""
        _, middle, up = self._tables
        middle = middle.to(x.device, x.dtype)
        magnitude = x.abs()
        below = torch.searchsorted(middle, magnitude.contiguous())  # midpoints strictly below: a tie stays down
        tie = (below < len(middle)) & (middle[below.clamp(max=len(middle) - 1)] == magnitude)
        return below + (tie & up.to(x.device)[below.clamp(max=len(middle) - 1)])

    def encode(self, x: Tensor, params: Params) -> Tensor:
        p = as_like(params, x)
        y = x / expand(self.effective(p))
        return (self._index(y) + (torch.signbit(y).long() << (self.exponent + self.mantissa))).to(torch.uint8)

    def decode(self, codes: Tensor, params: Params) -> Tensor:
        s = self.effective(params)
        table = self._tables[0].to(codes.device, s.dtype)
        sign = 1 << (self.exponent + self.mantissa)
        whole = codes.long()
        magnitude = table[(whole & (sign - 1)).clamp(max=len(table) - 1)]
        return torch.where(whole >= sign, -magnitude, magnitude) * expand(s)

    def quantize(self, x: Tensor, params: Params) -> Tensor:
        p = as_like(params, x)
        s = expand(self.effective(p))
        return self.nearest(x / s) * s

    def nearest(self, y: Tensor) -> Tensor:
        """The value of the table (scale 1) nearest to each ``y``, float32 or float64, without a look-up:

            e = max(1, floor(log2 |y|) + bias),  s = 2^(e - M - bias),  s round(clip(y) / s)

        with ``2^floor(log2 |y|)`` read off the bits of ``|y|``, so it is exact at powers of two. Half goes to the even mantissa; without a
        mantissa (M = 0) to the even exponent, which is the even code.
        """
        y = y.detach().clamp(-self.largest, self.largest)  # a constant to gradients, as codes are
        whole, kept = (torch.int32, 0x7F800000) if y.dtype == torch.float32 else (torch.int64, 0x7FF0000000000000)
        bias = 2 ** (self.exponent - 1) - 1
        binade = y.view(whole).bitwise_and(kept).view(y.dtype).clamp_(min=2.0 ** (1 - bias))  # 2^floor(log2 |y|)
        step = binade if self.mantissa == 0 else binade * 2.0**-self.mantissa
        rounded = (y / step).round_().mul_(step)
        if self.mantissa == 0:  # 1.5 binades round to 2: right only where the code of 2 binades is even
            odd = kept & -kept if bias % 2 == 0 else 0  # lowest bit of the exponent field, whose offset (127, 1023) is odd: an even code
            down = (y.abs() == 1.5 * binade) & (binade.view(whole).bitwise_and(kept & -kept) == odd)
            rounded = torch.where(down, torch.copysign(binade, y), rounded)
        return rounded

    def column_grid(self, params: Mapping[str, Tensor]) -> ColumnGrid:
        s = self.effective(params)
        values, codes = self.values()
        return TableGrid(s, values.to(s.device, s.dtype), codes.to(s.device))

    def param_bits(self) -> dict[str, int]:
        return {"scale": scales.BITS[self.scale]}

    def to_json(self) -> dict[str, Any]:
        found = {
            "kind": "float",
            "exponent": self.exponent,
            "mantissa": self.mantissa,
            "finite": self.finite,
            "scale": self.scale,
        }
        return found if self.nan else found | {"nan": False}

    def __str__(self) -> str:
        kind = f"e{self.exponent}m{self.mantissa}" + ("" if self.nan else " without NaN") + ("" if self.finite else " with infinities")
        return kind + ("" if self.scale == "float16" else f" {self.scale} scales")


@lru_cache(maxsize=64)
def _named(form: Float) -> Tensor:
    """One tensor a format, which its products share."""
    return form.decode(torch.arange(1 << form.bits, dtype=torch.uint8), {"scale": torch.ones(())})
