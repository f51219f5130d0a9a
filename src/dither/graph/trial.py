"""One rewrite after another, tried on a float64 copy of a module with random weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from dither.graph.exact import (
    bench_copy,
    exact_calls,
    float64_default,
    randomize,
    relative_difference,
    run_exactly,
    untie,
)
from dither.graph.verify import EXACT

Calls = Sequence[tuple[Sequence[Any], Mapping[str, Any]]]


class Trial:
    """``bench``: the copy, whose weights whoever rewrites them puts back; ``generator``: for what is drawn. Made by `trial`."""

    def __init__(self, module: nn.Module, calls: Calls, seed: int) -> None:
        self.bench = bench_copy(module)
        untie(self.bench)
        self.calls = exact_calls([(tuple(a), dict(k)) for a, k in calls])
        self.generator = torch.Generator().manual_seed(seed)
        randomize(self.bench, self.generator)
        self.base = run_exactly(self.bench, self.calls)

    def unchanged(self) -> bool:
        """Whether every output is as it was, to `EXACT`."""
        return relative_difference(run_exactly(self.bench, self.calls), self.base) <= EXACT


@contextmanager
def trial(module: nn.Module, calls: Calls, seed: int) -> Iterator[Trial]:
    """A bench for ``module``, which is not changed. ``calls``: some of its calls ``(args, kwargs)``."""
    with float64_default():
        yield Trial(module, calls, seed)
