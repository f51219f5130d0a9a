"""Integers of 1 to 8 bits: the conventions of weight quantization, each under its name.

    asymmetric, integer zero point (default; GPTQ, AWQ):  w_hat = s (q - z),   s = (max - min) / N,  z = round(-min / s),  N = 2^b - 1
    asymmetric, float offset (``zero="float"``; Q4_1):     w_hat = s q + m,     s = (max - min) / N,  m = min
    ``sym="restricted"``:                                  w_hat = s q,         s = max|w| / (2^(b-1) - 1), q in -K .. K
    ``sym="full"`` (GPTQ's sym):                           w_hat = s q,         s = 2 max|w| / N,     q in -2^(b-1) .. 2^(b-1) - 1
    ``sym="extremum"`` (Q4_0):                             w_hat = s q,         s = w_e / -2^(b-1),   w_e the largest entry, with its sign

Ties round to even. Codes are stored unsigned (symmetric ones shifted by 2^(b-1)).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from dither.formats import scales
from dither.formats.format import Format, Params, as_like, expand
from dither.kernels import AffineGrid, ColumnGrid, OffsetGrid, TableGrid

SYMMETRIC = ("restricted", "full", "extremum")


@dataclass(frozen=True)
class Int(Format):
    """``Int(4)``: 16 levels, asymmetric with an integer zero point, float16 scale. Raises ValueError for values out of range."""

    bits: int
    sym: Literal[False, "restricted", "full", "extremum"] | str | bool = False
    zero: str = "int"
    scale: str = "float16"

    def __post_init__(self) -> None:
        if isinstance(self.bits, bool) or not isinstance(self.bits, int) or not 1 <= self.bits <= 8:
            raise ValueError(f"bits must be 1 to 8, not {self.bits!r}")
        if self.sym is True:
            object.__setattr__(self, "sym", "restricted" if self.bits > 1 else "full")
        if self.sym is not False and self.sym not in SYMMETRIC:
            raise ValueError(f"sym must be False or one of {', '.join(SYMMETRIC)}, not {self.sym!r}")
        if self.sym == "restricted" and self.bits == 1:
            raise ValueError("sym='restricted' needs at least 2 bits: with 1 bit it has no level but 0")
        if self.zero not in ("int", "float"):
            raise ValueError(f"zero must be 'int' or 'float', not {self.zero!r}")
        scales.check(self.scale)
        if self.sym == "extremum" and self.scale == "e8m0":
            raise ValueError("sym='extremum' has scales of either sign, which e8m0 cannot store: choose another scale")

    @property
    def code_max(self) -> int:
        """Largest code, N = 2^b - 1."""
        return (1 << self.bits) - 1

    @property
    def middle(self) -> int:
        """The code of 0 in symmetric formats."""
        return 1 << (self.bits - 1)

    def range(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if x.shape[-1] == 0:
            empty = x.new_zeros(x.shape[:-1])
            return empty, empty.clone()
        lo, hi = x.amin(-1), x.amax(-1)
        if self.sym == "extremum":  # the extreme entry keeps its sign: (w_e, |w_e|)
            return torch.where(hi >= -lo, hi, lo), torch.maximum(-lo, hi)
        if self.sym:
            peak = torch.maximum(-lo, hi)
            return -peak, peak
        if self.zero == "int":
            return lo.clamp(max=0), hi.clamp(min=0)
        return lo, hi

    def params(self, lo: Tensor, hi: Tensor, shared: Params | None = None) -> Params:
        shared = shared or {}
        if self.sym == "extremum":
            return self._scaled(lo / -self.middle, shared, {})
        if self.sym:
            return self._scaled(hi / (self.middle - 1 if self.sym == "restricted" else self.code_max / 2), shared, {})
        if self.zero == "float":
            found = self._scaled((hi - lo) / self.code_max, shared, {})
            found["offset"] = lo.clamp(-65504.0, 65504.0).to(torch.float16).to(lo.dtype)
            return found
        flat = (lo == 0) & (hi == 0)  # a block of zeros: any scale does
        lo, hi = torch.where(flat, -torch.ones_like(lo), lo), torch.where(flat, torch.ones_like(hi), hi)
        found = self._scaled((hi - lo) / self.code_max, shared, {})
        found["zero_point"] = (-lo / self._effective(found)).round().clamp(0, self.code_max)
        return found

    def _scaled(self, scale: Tensor, shared: Params, found: Params) -> Params:
        if "global_scale" in shared:
            found["global_scale"] = shared["global_scale"]
            scale = scale / shared["global_scale"]
        found["scale"] = scales.stored(scale, self.scale, self._headroom)
        return found

    @property
    def _headroom(self) -> float:
        """How far beyond the end of the range a value may lie and still round into it: half a step, in units of what the scale is divided by."""
        if self.sym in ("full", "extremum"):
            return 1.0  # the range ends half a step beyond the largest code, or is spanned by the lowest one alone
        return 1 + 0.5 / max(self.middle - 1 if self.sym else self.code_max, 1)

    def shared(self, x: Tensor) -> Params:
        if self.scale != "e4m3":
            return {}
        peak = x.abs().amax().float() if x.numel() else torch.ones(())
        levels = self.code_max / 2 if self.bits > 1 else 1.0
        return {"global_scale": (peak / (448.0 * levels)).clamp(min=2.0**-100)}

    @staticmethod
    def _effective(params: Mapping[str, Tensor]) -> Tensor:
        """The scale that codes are multiplied with."""
        return params["scale"] * params["global_scale"] if "global_scale" in params else params["scale"]

    def _whole(self, x: Tensor, params: Params) -> tuple[Tensor, Params]:
        """Codes as floats, unsigned, clipped."""
        p = as_like(params, x)
        s = expand(self._effective(p))
        if self.sym:
            low = 1 if self.sym == "restricted" else 0
            return (x / s).round_().add_(self.middle).clamp_(low, self.code_max), p
        if self.zero == "float":
            return ((x - expand(p["offset"])) / s).round_().clamp_(0, self.code_max), p
        return (x / s).round_().add_(expand(p["zero_point"])).clamp_(0, self.code_max), p

    def _values(self, whole: Tensor, p: Params) -> Tensor:
        s = expand(self._effective(p))
        if self.sym:
            return (whole - self.middle) * s
        if self.zero == "float":
            return whole * s + expand(p["offset"])
        return (whole - expand(p["zero_point"])) * s

    def encode(self, x: Tensor, params: Params) -> Tensor:
        return self._whole(x, params)[0].to(torch.uint8)

    def decode(self, codes: Tensor, params: Params) -> Tensor:
        return self._values(codes.to(params["scale"].dtype), params)

    def quantize(self, x: Tensor, params: Params) -> Tensor:
        return self._values(*self._whole(x, params))

    def column_grid(self, params: Mapping[str, Tensor]) -> ColumnGrid:
        s = self._effective(params)
        if self.sym == "restricted":  # its lowest code is never used, so it is a list rather than a range
            codes = torch.arange(1, self.code_max + 1, device=s.device)
            return TableGrid(s, (codes - self.middle).to(s.dtype), codes.to(torch.uint8))
        if self.sym:
            return AffineGrid(s, torch.full_like(s, self.middle), self.code_max)
        if self.zero == "float":
            return OffsetGrid(s, params["offset"], self.code_max)
        return AffineGrid(s, params["zero_point"], self.code_max)

    def param_bits(self) -> dict[str, int]:
        found = {"scale": scales.BITS[self.scale]}
        if not self.sym:
            found |= {"zero_point": self.bits} if self.zero == "int" else {"offset": 16}
        return found

    def to_json(self) -> dict[str, Any]:
        return {"kind": "int", "bits": self.bits, "sym": self.sym, "zero": self.zero, "scale": self.scale}

    def __str__(self) -> str:
        kind = f"symmetric ({self.sym})" if self.sym else "asymmetric" if self.zero == "int" else "float offset"
        return f"int{self.bits} {kind}" + ("" if self.scale == "float16" else f" {self.scale} scales")
