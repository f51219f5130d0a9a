"""Where an axis carries numbers: at values that people count in."""

from __future__ import annotations

import math

_STEPS = (1.0, 2.0, 2.5, 5.0, 10.0)
# Mantissas within a decade, from sparse to dense; each is evenly enough spaced on a log axis to be read.
_MANTISSAS = (
    (1.0,),
    (1.0, 3.0),
    (1.0, 2.0, 5.0),
    (1.0, 1.5, 2.0, 3.0, 5.0, 7.0),
    tuple(float(m) for m in range(1, 10)),
)


def linear_ticks(lo: float, hi: float, count: int) -> list[float]:
    """At most ``max(count, 2)`` multiples of 1, 2, 2.5 or 5 times a power of ten inside ``[lo, hi]``.

    Raises ValueError unless ``lo < hi`` and both are finite.
    """
    if not (math.isfinite(lo) and math.isfinite(hi) and lo < hi):
        raise ValueError(f"lo, hi: must be finite and increasing, not {lo!r}, {hi!r}")
    count = max(count, 2)
    exponent = math.floor(math.log10((hi - lo) / count))
    for power in range(exponent, exponent + 3):
        for factor in _STEPS:
            step = factor * 10.0**power
            first, last = math.ceil(lo / step - 1e-9), math.floor(hi / step + 1e-9)
            if last - first + 1 <= count:
                # rounding to the step's own digits keeps 0.3 from becoming 0.30000000000000004
                return [round(i * step, max(0, 1 - power)) for i in range(first, last + 1)]
    return []


def integer_ticks(lo: int, hi: int, count: int) -> list[int]:
    """Whole numbers in ``[lo, hi]`` for an index axis (blocks, layers), at most ``max(count, 2)``."""
    if hi <= lo:
        return [lo]
    return sorted({int(t) for t in linear_ticks(lo, hi, count) if t == int(t)}) or [lo]


def log_ticks(lo: float, hi: float, count: int) -> list[float]:
    """At most ``max(count, 2)`` values for a log axis over ``[lo, hi]``: powers of ten with 1-3, 1-2-5, ... between
    where there is room; plain linear steps where the axis covers too little of a decade.

    Raises ValueError unless ``0 < lo < hi`` and both are finite.
    """
    if not (math.isfinite(lo) and math.isfinite(hi) and 0 < lo < hi):
        raise ValueError(f"lo, hi: must be positive, finite and increasing, not {lo!r}, {hi!r}")
    count = max(count, 2)
    first, last = math.floor(math.log10(lo)), math.ceil(math.log10(hi))
    best: list[float] = []
    for mantissas in _MANTISSAS:
        found = [m * 10.0**p for p in range(first, last + 1) for m in mantissas]
        inside = [round(v, 12 - math.floor(math.log10(v))) for v in found if lo * (1 - 1e-9) <= v <= hi * (1 + 1e-9)]
        if len(inside) > count:
            break
        best = inside
    if hi / lo < 10 and len(best) < min(4, count):
        best = [t for t in linear_ticks(lo, hi, count) if t > 0]
    if not best:  # more decades than labels: every k-th power of ten
        for k in range(2, last - first + 2):
            best = [
                10.0**p for p in range(first, last + 1) if p % k == 0 and lo * (1 - 1e-9) <= 10.0**p <= hi * (1 + 1e-9)
            ]
            if len(best) <= count:
                break
    return best
