"""A claim: what a paper says, how it is measured here, the bar, and what came out.

A measurement is a function of a seed that gives named figures; it runs once a seed, every arm in the same run. The record (JSON) holds the figures
with their spread, the versions, the machine, the time, and the verdict: ``holds``, ``fails`` or ``holds in part``, as measured.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dither.errors import UsageError

RECORDS = Path(__file__).parent / "records"
Figures = dict[str, float]
Say = Callable[[str], None]


@dataclass(frozen=True)
class Test:
    """One sentence of the claim made checkable: ``passes(means)`` of the mean figures, and what it means if it does not."""

    says: str
    passes: Callable[[Figures], bool]


@dataclass(frozen=True)
class Claim:
    """``paper`` figures are quoted for comparison; they are not what the verdict is measured against unless a test says so."""

    name: str
    sentence: str
    source: str
    work: str
    measure: Callable[[int, Say], Figures]
    tests: tuple[Test, ...]
    paper: dict[str, float] = field(default_factory=dict)
    seeds: tuple[int, ...] = (0, 1, 2)
    caveat: str = ""


def run(claim: Claim, *, seeds: Sequence[int] | None = None, say: Say = print) -> dict[str, Any]:
    """Measure a claim and return its record (plain data)."""
    from dither.quant.compare import machine

    chosen = tuple(seeds) if seeds is not None else claim.seeds
    started, by_seed = time.perf_counter(), {}
    for seed in chosen:
        say(f"{claim.name}: seed {seed}")
        by_seed[seed] = claim.measure(seed, say)
    names = list(next(iter(by_seed.values())))
    columns = {name: [figures[name] for figures in by_seed.values()] for name in names}
    means = {name: statistics.fmean(values) for name, values in columns.items()}
    holds = [bool(t.passes(means)) for t in claim.tests]
    outcomes = [{"says": t.says, "holds": held} for t, held in zip(claim.tests, holds, strict=True)]
    return {
        "claim": claim.name,
        "sentence": claim.sentence,
        "source": claim.source,
        "work": claim.work,
        "paper": claim.paper,
        "figures": {
            name: {
                "mean": means[name],
                "spread": statistics.stdev(values) if len(values) > 1 else None,
                "values": values,
            }
            for name, values in columns.items()
        },
        "tests": outcomes,
        "verdict": "holds" if all(holds) else "holds in part" if any(holds) else "fails",
        "caveat": claim.caveat,
        "seeds": list(chosen),
        "seconds": time.perf_counter() - started,
        **machine(),
    }


def save(record: dict[str, Any], folder: Path | None = None) -> Path:
    """Store a record under its claim's name."""
    from dither.quant.store import write_text

    path = (folder or RECORDS) / f"{record['claim']}.json"
    write_text(path, json.dumps(record, indent=1) + "\n")
    return path


def stored(name: str, folder: Path | None = None) -> dict[str, Any] | None:
    """The record of a claim, or None where it was never measured."""
    path = (folder or RECORDS) / f"{name}.json"
    return json.loads(path.read_text()) if path.is_file() else None


def find(name: str, claims: dict[str, Claim]) -> Claim:
    """The claim called ``name``. Raises UsageError that suggests the nearest."""
    import difflib

    if name in claims:
        return claims[name]
    near = difflib.get_close_matches(name, claims, n=1)
    raise UsageError(
        f"claim {name!r}: is unknown"
        + (f"; did you mean {near[0]!r}?" if near else "")
        + f" The claims are {', '.join(claims)}"
    )
