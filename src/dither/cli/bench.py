"""``dither bench``: how fast the kernels are on this machine, beside a peer and what memory allows."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import typer

from dither.cli import options as o


@dataclass(frozen=True)
class Benchmark:
    """``run(sizes, threads, rounds, say)`` measures and returns plain data; it ``say``s each line as it comes. ``sizes`` are the default."""

    says: str
    sizes: str
    run: Callable[[list[int], list[int], int, Callable[[str], None]], dict[str, Any]]


def softmax(sizes: list[int], threads: list[int], rounds: int, say: Callable[[str], None]) -> dict[str, Any]:
    """One float32 row of each size, on the best instruction set and the one below."""
    from dither.quant.machine import machine
    from dither.special import softmax_timing, timing

    found = []
    say("ns a number; then two_pass: times faster than the better three-pass and than torch, its bytes a second")
    say("over a copy's, its time over that of its passes without arithmetic")
    say(softmax_timing.HEAD)
    for row in softmax_timing.rows(sizes, threads, ["float32"], timing.instruction_sets()[:2] or [""], rounds):
        say(softmax_timing.line(row))
        found.append(row)
    return {"benchmark": "softmax", **machine(), "rows": found}


BENCHMARKS = {"softmax": Benchmark("softmax of one row: two passes, three passes and torch, against the speed of memory", "4K:256M", softmax)}


def command(
    name: Annotated[str | None, typer.Argument(help="The benchmark; without it, the list of them.", show_default=False)] = None,
    sizes: Annotated[
        str | None, typer.Option(help="Bytes of a row, from:to in steps of 4, or separated by commas.", show_default="the benchmark's own")
    ] = None,
    threads: Annotated[str, typer.Option(help="Numbers of threads, separated by commas.")] = "1,2",
    rounds: Annotated[int, typer.Option(min=1, help="Rounds that the median is of.")] = 5,
    json: o.Json = False,
) -> None:
    """Time a kernel beside its peers, which take turns in one run, and print the ratios.

    Example: dither bench softmax --sizes 4K:1G --threads 1,2
    """
    if name is None:
        if json:
            o.emit({n: {"says": b.says, "sizes": b.sizes} for n, b in BENCHMARKS.items()})
            return
        for n, benchmark in BENCHMARKS.items():
            print(f"{n:12} {benchmark.says}")
        return
    benchmark = _find(name)
    record = benchmark.run(parse_sizes(sizes or benchmark.sizes), parse_threads(threads), rounds, o.say if json else print)
    if json:
        from dither.quant.strict import strict

        o.emit(strict(record))


def _find(name: str) -> Benchmark:
    from dither.errors import UsageError

    if name not in BENCHMARKS:
        raise UsageError(f"benchmark {name!r}: is unknown. The benchmarks are {', '.join(BENCHMARKS)}")
    return BENCHMARKS[name]


def parse_sizes(text: str) -> list[int]:
    """``"4K:64K"`` -> 4096, 16384, 65536; ``"4K,1M"`` as listed. Raises UsageError for anything else, for 0, and from above to."""
    from dither.errors import UsageError

    begin, colon, end = text.partition(":")
    parts = [begin, end] if colon else text.split(",")
    if not all(re.fullmatch(r"[1-9]\d*[KMG]?", part.strip()) for part in parts):
        raise UsageError(f"--sizes {text}: must be such as 4K:1G or 4K,64K,1M")
    units = {"K": 10, "M": 20, "G": 30}
    values = [int(part.strip().rstrip("KMG")) << units.get(part.strip()[-1], 0) for part in parts]
    if not colon:
        return values
    if values[0] > values[1]:
        raise UsageError(f"--sizes {text}: must not fall")
    found = [values[0]]
    while found[-1] * 4 <= values[1]:
        found.append(found[-1] * 4)
    return found


def parse_threads(text: str) -> list[int]:
    """``"1,2"`` -> 1, 2. Raises UsageError."""
    from dither.errors import UsageError

    if not all(re.fullmatch(r"[1-9]\d{0,3}", part.strip()) for part in text.split(",")):
        raise UsageError(f"--threads {text}: must be positive numbers separated by commas")
    return [int(part) for part in text.split(",")]
