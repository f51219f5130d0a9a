"""Powers of a root of two: logarithmic codes for values in [0, s], such as the probabilities of attention.

Li, Xiao, Yang, Gu (RepQ), ICCV 2023, arXiv 2212.08254, section 3.3; base 2 (k = 1) is older: arXiv 2111.13824.

    q = round(-k log2(A / s)),  below 0: 0        A_hat = s 2^(-q / k) for q < n,   0 for q >= n        (base 2^(1/k): k = 1 is 2, k = 2 is sqrt 2)

and the same number by shifts, with one multiplier for each remainder of q by k (`Log.as_shifts`):

    A_hat = s 2^(((-q) mod k) / k) 2^(-ceil(q / k))        k = 2:   s (1 + (sqrt 2 - 1) (q mod 2)) 2^(-ceil(q / 2))

so a product A V is k sums of shifted values, one for each multiplier; for k > 1 it is no single product of integers.

All n = 2^b exponents are levels, and 0 is one more value, which b bits cannot name. ``zero`` says where it goes:

    "extra"    (the paper) code n = 2^b means 0. Values that are rounded on the fly and never stored need no room for it; a stored code takes
               b + 1 bits
    "last"     code 2^b - 1 means 0, in place of the smallest level; a stored code takes b bits

Largest relative error between levels: 2^(1 / 2k) - 1, i.e. 41.4 % for k = 1, 18.9 % for k = 2. Below s 2^(-(n - 1/2) / k) values become 0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dither.formats import scales
from dither.formats.format import Format, Params, as_like, expand
from dither.kernels import ColumnGrid, TableGrid

ZEROS = ("extra", "last")
SPAN = 128  # binades below the top of the range that float32 holds, with some left for the scale


@dataclass(frozen=True)
class Log(Format):
    """``Log(4)``: 16 powers of sqrt(1/2) and 0. ``exponent``: bits b of q; ``root``: k. Negative values become 0. ValueError out of range."""

    exponent: int
    root: int = 2
    zero: str = "extra"
    scale: str = "float32"

    def __post_init__(self) -> None:
        for name, value, most in (("exponent", self.exponent, 8), ("root", self.root, 64)):
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
                raise ValueError(f"{name} must be 1 to {most}, not {value!r}")
        if self.zero not in ZEROS:
            raise ValueError(f"zero must be one of {', '.join(ZEROS)}, not {self.zero!r}")
        if self.levels > SPAN * self.root:
            raise ValueError(
                f"exponent: {self.levels} powers of 2^(1/{self.root}) reach below what float32 holds (2^-{SPAN}); choose fewer bits or a larger root"
            )
        scales.check(self.scale)
        if self.scale == "e4m3":
            raise ValueError("scale: e4m3 needs a scale of the whole tensor, which logarithmic formats have not")

    @property
    def bits(self) -> int:  # type: ignore[override]
        """Of a stored code."""
        return self.exponent + (self.zero == "extra")

    @property
    def levels(self) -> int:
        """n: how many powers there are; also the code of 0."""
        return (1 << self.exponent) - (self.zero == "last")

    @property
    def highest_code(self) -> int:
        return self.levels

    def range(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if x.shape[-1] == 0:
            empty = x.new_zeros(x.shape[:-1])
            return empty, empty.clone()
        return x.new_zeros(x.shape[:-1]), x.amax(-1).clamp(min=0)

    def params(self, lo: Tensor, hi: Tensor, shared: Params | None = None) -> Params:
        """``scale`` = the top of the range, s."""
        return {"scale": scales.stored(torch.where(hi > 0, hi, torch.ones_like(hi)), self.scale)}

    def _whole(self, x: Tensor, params: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """q as whole numbers (int32), n for what becomes 0 (and for NaN); and s."""
        s = expand(as_like(params, x)["scale"])
        q = (x / s).clamp_(min=0).log2_().mul_(-self.root).round_()  # log2(0) = -inf, so q = inf
        return q.clamp_(0, self.levels).nan_to_num_(self.levels).to(torch.int32), s

    def _powers(self, like: Tensor) -> Tensor:
        """2^(-q / k) for q = 0 .. n - 1, then 0: each rounded once to the type of ``like``."""
        exact = [math.ldexp(2.0 ** ((-q % self.root) / self.root), -q // self.root) for q in range(self.levels)]
        return torch.tensor([*exact, 0.0], dtype=torch.float64).to(like.device, like.dtype)

    def _values(self, q: Tensor, s: Tensor) -> Tensor:
        return s * self._powers(s)[q]

    def encode(self, x: Tensor, params: Params) -> Tensor:
        """Codes, 0 to n. ValueError where code n does not fit a byte (8 bits and ``zero="extra"``)."""
        if self.bits > 8:
            raise ValueError(f"{self}: its codes of 9 bits are never stored; use zero='last'")
        return self._whole(x, params)[0].to(torch.uint8)

    def decode(self, codes: Tensor, params: Params) -> Tensor:
        s = params["scale"]
        return self._values(codes.to(torch.int32), expand(s))

    def quantize(self, x: Tensor, params: Params) -> Tensor:
        """NaN stays NaN."""
        return self._values(*self._whole(x, params)).masked_fill_(x.isnan(), torch.nan)

    def as_shifts(self, codes: Tensor, params: Params) -> tuple[Tensor, Tensor]:
        """``(multiplier, shift)``, both like ``codes (..., n)``: A_hat = multiplier 2^-shift, with k different multipliers. 0 has multiplier 0."""
        s = expand(params["scale"])
        q = codes.to(torch.float64)
        multiplier = s * torch.pow(2.0, (-q).remainder(self.root) / self.root).to(s.dtype)
        return torch.where(q < self.levels, multiplier, torch.zeros_like(multiplier)), (q / self.root).ceil().to(s.dtype)

    def column_grid(self, params: Mapping[str, Tensor]) -> ColumnGrid:
        """The values as a list: kernels then take the nearest by distance, where `encode` takes the nearest by ratio."""
        s = params["scale"]
        codes = torch.arange(self.levels, -1, -1, device=s.device)
        return TableGrid(s, self._powers(s).flip(0), codes.to(torch.uint8))

    def param_bits(self) -> dict[str, int]:
        return {"scale": scales.BITS[self.scale]}

    def to_json(self) -> dict[str, Any]:
        return {"kind": "log", "exponent": self.exponent, "root": self.root, "zero": self.zero, "scale": self.scale}

    def __str__(self) -> str:
        base = {1: "2", 2: "sqrt 2"}.get(self.root, f"2^(1/{self.root})")
        kind = f"log{self.exponent} base {base}" + (" and 0" if self.zero == "extra" else ", 0 in the last place")
        return kind + ("" if self.scale == "float32" else f" {self.scale} scales")
