"""Reference values of Bessel functions from ball arithmetic (arb, by python-flint): the radius proves the digits."""

from __future__ import annotations

import functools

from flint import arb, ctx


@functools.cache
def exact(kind: str, v: float, x: float) -> tuple[arb, arb]:
    """``log I_v(x)`` and I_{v+1} / I_v, or ``log K_v(x)`` and K_{v-1} / K_v, to 25 digits."""
    bits = 128
    while True:
        ctx.prec = bits
        order, argument = arb(v), arb(x)
        bessel = argument.bessel_i if kind == "I" else argument.bessel_k
        value = bessel(order)
        log, ratio = value.log(), bessel(order + 1 if kind == "I" else order - 1) / value
        if log.is_finite() and ratio.is_finite() and min(log.rel_accuracy_bits(), ratio.rel_accuracy_bits()) > 84:
            return log, ratio
        bits = bits * 3 // 2


def mixed_error(found: float, expected: arb) -> float:
    """``|found - expected| / max(1, |expected|)``."""
    ctx.prec = 200
    scale = abs(expected)
    return float((abs(arb(found) - expected) / (scale if scale > 1 else arb(1))).mid())


def relative_error(found: float, expected: arb) -> float:
    ctx.prec = 200
    return float((abs(arb(found) - expected) / abs(expected)).mid())
