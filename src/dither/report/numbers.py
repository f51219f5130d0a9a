"""Numbers for people: few digits, units, and a dash where nothing is known."""

from __future__ import annotations

import math
from collections.abc import Sequence

NOTHING = "–"


def perplexity(value: float | None) -> str:
    """``20.36``, ``275.1``, ``1,234``, ``1.3e6``; ``diverged`` where it is not finite."""
    if value is None:
        return NOTHING
    if not math.isfinite(value):
        return "diverged"
    if value < 100:
        return f"{value:.2f}"
    if value < 1000:
        return f"{value:.1f}"
    return f"{value:,.0f}" if value < 1e5 else short(value)


def percent(value: float | None) -> str:
    """``+11.3 %``, ``-0.1 %``; far away without decimals, ``x 48`` where percent would hide how bad it is."""
    if value is None or not math.isfinite(value):
        return NOTHING
    if value >= 1e4:
        factor = value / 100 + 1
        return f"x {factor:,.0f}" if factor < 1e5 else f"x {short(factor)}"
    if abs(value) >= 100:
        return f"{value:+,.0f} %"
    return f"{value:+.1f} %"


def seconds(value: float | None) -> str:
    """``8.4 s``, ``1 min 24 s``, ``2 h 03 min``."""
    if value is None or not math.isfinite(value):
        return NOTHING
    if value < 99.95:
        return f"{value:.1f} s"
    whole = round(value)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    whole = round(value / 60)
    return f"{whole // 60} h {whole % 60:02d} min"


def size(value: float | None) -> str:
    """Bytes in decimal units: ``96.4 MB``, ``1.12 GB``."""
    if value is None or not math.isfinite(value):
        return NOTHING
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= 0.9995 * scale:
            return f"{value / scale:.3g} {unit}" if value < 999.5 * scale else f"{value / scale:,.0f} {unit}"
    return f"{value:.0f} B"


def bits(value: float | None) -> str:
    """True bits per weight: ``4.31``."""
    return NOTHING if value is None or not math.isfinite(value) else f"{value:.2f}"


def short(value: float | None) -> str:
    """Three significant digits at any magnitude: ``0.0123``, ``12.3``, ``1.23e-6``."""
    if value is None:
        return NOTHING
    if not math.isfinite(value):
        return "not finite"
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        text = f"{value:.3g}"
        return f"{value:.0f}" if "e" in text else text
    mantissa, _, exponent = f"{value:.2e}".partition("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"


def tick(value: float, decimals: int | None = None) -> str:
    """The label of an axis tick: ``0.5``, ``20``, ``1,000``, ``1e6``; no superfluous zeros unless told how many."""
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        if decimals is not None:
            return f"{value:,.{decimals}f}"
        return f"{value:,.6f}".rstrip("0").rstrip(".")
    mantissa, _, exponent = f"{value:.4e}".partition("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"


def linear_labels(values: Sequence[float]) -> list[str]:
    """The labels of evenly spaced ticks, all with as many decimals as one of them needs."""
    plain = [tick(value) for value in values]
    if any("e" in text for text in plain):
        return plain
    decimals = max((len(text.partition(".")[2]) for text in plain), default=0)
    return [tick(value, decimals) for value in values]
