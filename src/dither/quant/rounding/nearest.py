"""Round to nearest (RTN): every weight goes to the closest point of its grid. O(O I) time, no data."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from dither.formats import Params, QTensor, Scheme
from dither.quant.parts import Rounded, Rounding
from dither.quant.statistics import Statistics


def nearest(weight: Tensor, scheme: Scheme, params: Params | None = None) -> QTensor:
    """``weight [O, I]`` -> the nearest codes on ``params`` (default: ``scheme.fit(weight)``). ValueError where not finite."""
    params = scheme.fit(weight) if params is None else params
    return QTensor.from_codes(scheme.encode(weight, params), params, scheme, tuple(weight.shape))


@dataclass(frozen=True)
class Nearest(Rounding):
    """The `nearest` function as a part."""

    def round(self, weight: Tensor, scheme: Scheme, params: Params, statistics: Statistics | None) -> Rounded:
        return Rounded(nearest(weight, scheme, params))
