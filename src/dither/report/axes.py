"""An axis: values to pixels, linear or logarithmic."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from dither.report.ticks import linear_ticks, log_ticks


@dataclass(frozen=True)
class Axis:
    """Maps ``[lo, hi]`` to the pixels ``[start, end]`` (``start > end`` for an axis that points up)."""

    lo: float
    hi: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """The pixel of a value; values outside of the axis stop at its ends."""
        if self.log:
            part = (math.log(max(value, 1e-300)) - math.log(self.lo)) / (math.log(self.hi) - math.log(self.lo))
        else:
            part = (value - self.lo) / (self.hi - self.lo)
        return self.start + min(max(part, 0.0), 1.0) * (self.end - self.start)

    def ticks(self, spacing: float) -> list[float]:
        """Nice values at least about ``spacing`` pixels apart on average."""
        count = int(abs(self.end - self.start) / spacing) + 1
        return log_ticks(self.lo, self.hi, count) if self.log else linear_ticks(self.lo, self.hi, count)


def linear_domain(values: Iterable[float], least: float, pad: float = 0.06) -> tuple[float, float]:
    """``(lo, hi)`` around the values, at least ``least`` wide, with ``pad`` of the span on either side."""
    values = list(values)
    lo, hi = (min(values), max(values)) if values else (0.0, 0.0)
    middle, span = (lo + hi) / 2, max(hi - lo, least)
    return middle - span * (0.5 + pad), middle + span * (0.5 + pad)


def log_domain(values: Iterable[float], least: float, pad: float = 0.06) -> tuple[float, float]:
    """The same for positive values on a log axis; ``least`` is the smallest ratio ``hi / lo``."""
    # magnitudes that no axis needs are drawn at its ends, so that padding cannot overflow
    lo, hi = linear_domain((math.log(min(max(v, 1e-100), 1e100)) for v in values), math.log(least), pad)
    return math.exp(lo), math.exp(hi)
