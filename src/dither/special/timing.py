"""How long calls take beside one another, and what memory allows at best: what benchmarks of kernels share.

On a shared machine one call after the other measures the neighbours. So calls alternate, round after round, and each call's figure is its median
over the rounds. Memory is in huge pages for everybody, else the search for pages is what a long row measures.
"""

from __future__ import annotations

import mmap
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from dither.kernels.extension import extension

HUGE = 2 << 20  # bytes of a huge page
LEAST = 0.02  # seconds that a call is repeated for


def buffer(count: int, dtype: torch.dtype) -> Tensor:
    """``[count]`` zeros in huge pages, where the system has them."""
    memory = mmap.mmap(-1, -(-max(count * dtype.itemsize, 1) // HUGE) * HUGE)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype, count=count).zero_()  # every page is there from now on


def alternating(runs: Mapping[str, Callable[[], object]], rounds: int = 5, least: float = LEAST) -> dict[str, float]:
    """Seconds a call, the median over ``rounds`` in which all take turns, each round starting with another; within a round the mean over at least
    ``least`` seconds."""
    if rounds < 1:
        raise ValueError(f"rounds: must be at least 1, not {rounds}")
    for run in runs.values():
        run()
    found: dict[str, list[float]] = {name: [] for name in runs}
    names = list(runs)
    for first in range(rounds):
        for name in (names[(first + i) % len(names)] for i in range(len(names))):
            run = runs[name]
            count, started = 0, time.perf_counter()
            while (now := time.perf_counter()) - started < least or count == 0:
                run()
                count += 1
            found[name].append((now - started) / count)
    return {name: statistics.median(seconds) for name, seconds in found.items()}


@dataclass(frozen=True)
class Streams:
    """Seconds that memory takes for the three kinds of pass over a row: reading it, copying it, changing it in place."""

    read: float
    copy: float
    update: float


def streams(x: Tensor, y: Tensor) -> dict[str, Callable[[], object]]:
    """Passes without arithmetic worth the name, by torch, over the rows that a benchmark uses: what `Streams` is measured with."""
    return {"read": lambda: x.max(), "copy": lambda: y.copy_(x), "update": lambda: y.neg_()}


@contextmanager
def settings(threads: int, isa: str) -> Iterator[None]:
    """So many threads for torch and the kernels, and an instruction set for the kernels (``DITHER_ISA``; empty for the best)."""
    before, chosen = torch.get_num_threads(), os.environ.get("DITHER_ISA")
    torch.set_num_threads(threads)
    os.environ["DITHER_ISA"] = isa
    try:
        yield
    finally:
        torch.set_num_threads(before)
        os.environ.pop("DITHER_ISA", None)
        if chosen is not None:
            os.environ["DITHER_ISA"] = chosen


def instruction_sets() -> list[str]:
    """Those that this build and processor have, the best first; none without the C++ extension."""
    native, found = extension(), []
    for isa in ("avx512", "avx2", "scalar") if native is not None else ():
        try:
            native.isa(isa)  # type: ignore[union-attr]
            found.append(isa)
        except ValueError:
            continue
    return found
