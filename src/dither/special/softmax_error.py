"""How far softmax is from the softmax of the same numbers in float64, in units of the last place, on rows that are hard on a sum of exponentials."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from dither.special.softmax import ALGORITHMS, logsumexp, softmax

NORMAL = 1.2e-38  # below, results may be flushed to 0, and units of the last place do not shrink with the number


def rows(count: int, seed: int) -> dict[str, Tensor]:
    """Rows ``[1, count]`` float32 by name."""
    g = torch.Generator().manual_seed(seed)
    normal = torch.randn(1, count, generator=g)
    return {
        "normal": normal,
        "uniform to 1000": torch.rand(1, count, generator=g) * 2000 - 1000,
        "uniform to 30": torch.rand(1, count, generator=g) * 60 - 30,
        "constant": torch.full((1, count), float(torch.rand((), generator=g))),
        "falling": torch.linspace(80, 0, count)[None],
        "masked": torch.where(torch.rand(1, count, generator=g) < 0.5, -torch.inf, normal),
    }


def errors(count: int = 100_003, seed: int = 0) -> dict[str, dict[str, float]]:
    """The largest error in ulp by algorithm and kind of row; "torch" is torch.softmax, "logsumexp" that of `logsumexp`."""
    ways: dict[str, Callable[[Tensor], Tensor]] = {name: _way(name) for name in ALGORITHMS if name != "auto"}
    ways["torch"] = lambda x: x.softmax(-1)
    given = rows(count, seed)
    found = {name: {kind: in_ulp(way(x), x.double().softmax(-1)) for kind, x in given.items()} for name, way in ways.items()}
    return found | {"logsumexp": {kind: in_ulp(logsumexp(x), x.double().logsumexp(-1)) for kind, x in given.items()}}


def _way(algorithm: str) -> Callable[[Tensor], Tensor]:
    return lambda x: softmax(x, algorithm=algorithm)


def in_ulp(y: Tensor, exact: Tensor) -> float:
    """The largest distance of ``y`` float32 from ``exact`` float64, in units of the last place of the latter, where that is a normal number."""
    ulp = torch.from_numpy(np.spacing(exact.abs().float().numpy())).double()
    return float(((y.double() - exact).abs() / ulp)[exact.abs() > NORMAL].max())
