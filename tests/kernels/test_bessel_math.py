"""The elementary functions of csrc/math_f64.hpp against mpmath, in units in the last place."""

from __future__ import annotations

import math
from collections.abc import Callable

import mpmath
import pytest
import torch
from torch import Tensor

from dither.kernels.extension import extension, isa
from dither.special.bessel_tables import bessel_tables

NAMES = ("exp", "expm1", "log", "log1p")
EXACT: dict[str, Callable[[mpmath.mpf], mpmath.mpf]] = {"exp": mpmath.exp, "expm1": mpmath.expm1, "log": mpmath.log, "log1p": mpmath.log1p}


def spread(low: float, high: float, n: int) -> Tensor:
    """Evenly in the logarithm."""
    return torch.linspace(math.log(low), math.log(high), n, dtype=torch.float64).exp()


def arguments(name: str) -> Tensor:
    if name == "log":  # every octave, denormal numbers, and next to 1
        near = 1 + torch.linspace(-0.3, 0.6, 301, dtype=torch.float64)
        closest = 1 + torch.arange(-8, 9, dtype=torch.float64) * 2.0**-52
        return torch.cat([spread(1e-300, 1e300, 301), near, closest, torch.tensor([5e-324, 1e-310, 1.7e308], dtype=torch.float64)])
    if name == "log1p":
        return torch.cat([spread(1e-300, 1e300, 201), -spread(1e-300, 0.999999, 201)])
    grown = spread(1e-12, 700, 301)
    return torch.cat([grown, -grown, torch.linspace(-40, 40, 301, dtype=torch.float64)])


@pytest.mark.parametrize("name", NAMES)
def test_within_an_ulp(path: str, name: str) -> None:
    native = extension()
    if native is None:
        pytest.skip("the reference uses torch's functions")
    x = arguments(name)
    padded = torch.nn.functional.pad(x, (0, -len(x) % 8), value=0.5)
    y = torch.empty_like(padded)
    native.elementary(NAMES.index(name), bessel_tables().logs, padded, y, isa())
    # products are rounded on the way without a fused multiply-add
    bound = 1.0 if path != "scalar" else 2.0
    with mpmath.workdps(40):
        for given, found in zip(x.tolist(), y.tolist(), strict=False):
            exact = EXACT[name](mpmath.mpf(given))
            ulp = math.ulp(abs(float(exact))) if exact else math.ulp(0.0)
            assert abs(mpmath.mpf(found) - exact) <= bound * ulp, (given, found)


def test_exponentials_end_at_the_smallest_normal_number(path: str) -> None:
    native = extension()
    if native is None:
        pytest.skip("the reference uses torch's functions")
    x = torch.tensor([-708.0, -709, -1e9, -math.inf, 0, 0, 0, 0], dtype=torch.float64)
    y = torch.empty_like(x)
    native.elementary(0, bessel_tables().logs, x, y, isa())
    assert bool((y[:4] == y[0]).all()) and math.isclose(float(y[0]), math.exp(-708), rel_tol=1e-15)
    assert bool((y[4:] == 1).all())
