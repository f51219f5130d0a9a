"""How long the four algorithms of softmax take on one row, beside torch, and what memory alone would take for their passes.

    algorithm      passes                         numbers moved    with the line fetched before a write
    two_pass       read, copy                     3 N              4 N
    recompute      read, read, copy               4 N              5 N
    reload         read, copy, change in place    5 N              6 N
    online         read, copy                     3 N              4 N

Out of the caches each should take what its passes take without arithmetic (``predicted``); and bytes a second should be alike, which is
how the paper explains its gain (Dukhan and Ablavatski, 2020, 2001.04438).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from dither import kernels
from dither.special.timing import alternating, buffer, settings, streams

WORDS = {"two_pass": 3, "recompute": 4, "reload": 5, "online": 3}
PASSES = {"two_pass": ("read", "copy"), "recompute": ("read", "read", "copy"), "reload": ("read", "copy", "update"), "online": ("read", "copy")}
THREE_PASS = ("recompute", "reload")
TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
Row = dict[str, Any]


def measure(size: int, *, dtype: torch.dtype = torch.float32, threads: int = 1, isa: str = "", rounds: int = 5, seed: int = 0) -> Row:
    """Times of one row of ``size`` bytes of normal numbers: ``{"bytes", "numbers", "type", "threads", "isa", "auto", "seconds": {name: s},
    "streams": {pass: s}, "predicted": {algorithm: s}, "bytes_a_second": {algorithm: B/s}}``.

    Names are the four algorithms, "auto", "stream" (two_pass past the caches), "log_softmax", "logsumexp" and "torch". Takes twice
    ``size`` of memory. Raises ValueError for a size below one number, and rounds below 1.
    """
    count = size // dtype.itemsize
    if count < 1:
        raise ValueError(f"size: must be {dtype.itemsize} bytes or more, not {size}")
    if threads < 1:
        raise ValueError(f"threads: must be at least 1, not {threads}")
    x, y = buffer(count, dtype).view(1, count), buffer(count, dtype).view(1, count)
    generator = torch.Generator().manual_seed(seed)
    for begin in range(0, count, 1 << 20):  # a part at a time, since it is drawn in float32 beside the row
        part = x[0, begin : begin + (1 << 20)]
        part.copy_(torch.randn(len(part), generator=generator))
    auto = kernels.softmax_algorithm(size)
    runs: dict[str, Callable[[], object]] = {name: _run(x, y, name) for name in kernels.SOFTMAX_ALGORITHMS}
    runs["stream"] = lambda: kernels.softmax_rows(x, "two_pass", stream=True, out=y)
    runs["log_softmax"] = lambda: kernels.log_softmax_rows(x, out=y)
    runs["logsumexp"] = lambda: kernels.logsumexp_rows(x)
    runs["torch"] = lambda: torch.softmax(x, -1, out=y)
    with settings(threads, isa), torch.inference_mode():
        backend = kernels.backend()
        found = alternating(runs | streams(x, y), rounds)
    limits = {name: found.pop(name) for name in ("read", "copy", "update")}
    return {
        "bytes": size, "numbers": count, "type": str(dtype).removeprefix("torch."), "threads": threads, "isa": backend, "auto": auto,
        "seconds": found, "streams": limits,
        "predicted": {name: sum(limits[p] for p in passes) for name, passes in PASSES.items()},
        "bytes_a_second": {name: words * size / found[name] for name, words in WORDS.items()},
    }  # fmt: skip


def _run(x: Tensor, y: Tensor, algorithm: str) -> Callable[[], object]:
    return lambda: kernels.softmax_rows(x, algorithm, out=y)


def ratio(row: Row, name: str = "two_pass") -> float:
    """How many times faster ``name`` is than the faster of the two three-pass algorithms."""
    seconds = row["seconds"]
    return float(min(seconds[other] for other in THREE_PASS) / seconds[name])


def lag(row: Row) -> float:
    """How much longer "auto" takes than the fastest of the four: 0.05 for 5 %."""
    seconds = row["seconds"]
    return float(seconds[row["auto"]] / min(seconds[name] for name in WORDS) - 1)


def alike(row: Row, fetched: int = 0) -> float:
    """The largest of the algorithms' bytes a second over the smallest; with ``fetched`` = 1, counting the line that is fetched before a write."""
    rates = [(words + fetched) / row["seconds"][name] for name, words in WORDS.items()]
    return float(max(rates) / min(rates))


def rows(
    sizes: Sequence[int], threads: Sequence[int], types: Sequence[str], isas: Sequence[str], rounds: int = 5, seed: int = 0
) -> Iterator[Row]:
    """`measure` of every combination, short rows first."""
    for size in sizes:
        for name in types:
            for isa in isas:
                for count in threads:
                    yield measure(size, dtype=TYPES[name], threads=count, isa=isa, rounds=rounds, seed=seed)


HEAD = f"{'row':>8} {'type':>8} {'isa':>7} {'threads':>7}  {'two_pass':>8} {'recomp.':>8} {'reload':>8} {'online':>8} {'stream':>8} {'torch':>8}"
HEAD += f"  {'x 3-pass':>8} {'x torch':>8} {'of copy':>8} {'model':>6}  auto"


def line(row: Row) -> str:
    """A row for people: ns a number, then two_pass against the better three-pass and torch, its bytes a second against copying, and its time
    against what its passes take without arithmetic (below 1 where the plain passes wait for memory more than softmax does)."""
    seconds, count = row["seconds"], row["numbers"]
    times = " ".join(f"{1e9 * seconds[name] / count:8.3f}" for name in ("two_pass", "recompute", "reload", "online", "stream", "torch"))
    copying = 2 * row["bytes"] / row["streams"]["copy"]
    facts = f"{short(row['bytes']):>8} {row['type']:>8} {row['isa']:>7} {row['threads']:7}"
    against = f"{ratio(row):8.2f} {seconds['torch'] / seconds['two_pass']:8.2f} {row['bytes_a_second']['two_pass'] / copying:8.2f}"
    return f"{facts}  {times}  {against} {seconds['two_pass'] / row['predicted']['two_pass']:6.2f}  {row['auto']}"


def short(size: int) -> str:
    """``4K``, ``64M``, ``1G``: the unit that divides."""
    for unit, shift in (("G", 30), ("M", 20), ("K", 10)):
        if size and size % (1 << shift) == 0:
            return f"{size >> shift}{unit}"
    return str(size)
