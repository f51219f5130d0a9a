"""A claim: what a paper says, how it is measured here, the bar, and what came out.

A measurement is a function of a seed that gives named figures; it runs once a seed, every arm in the same run. The record (strict JSON) holds the
figures with their spread, the data, versions, machine, time, and the verdict: ``holds``, ``fails`` or ``holds in part``, as measured.
"""

from __future__ import annotations

import difflib
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dither.errors import CheckpointError, UsageError

RECORDS = Path(__file__).parent / "records"
Figures = dict[str, float]
Say = Callable[[str], None]


@dataclass(frozen=True)
class Test:
    """One sentence of the claim made checkable: ``passes(means)`` of the mean figures, and what it means if it does not."""

    __test__ = False  # not one of pytest's

    says: str
    passes: Callable[[Figures], bool]


@dataclass(frozen=True)
class Claim:
    """``paper`` figures are quoted for comparison; they are not what the verdict is measured against unless a test says so. ``data`` says
    at run time what the work was measured on."""

    name: str
    sentence: str
    source: str
    work: str
    measure: Callable[[int, Say], Figures]
    tests: tuple[Test, ...]
    data: Callable[[], str]
    paper: dict[str, float] = field(default_factory=dict)
    seeds: tuple[int, ...] = (0, 1, 2)
    caveat: str = ""

    def __post_init__(self) -> None:
        if not self.tests:
            raise ValueError(f"claim {self.name}: needs at least one test, or its verdict would mean nothing")


def run(claim: Claim, *, seeds: Sequence[int] | None = None, say: Say = print, folder: Path | None = None) -> dict[str, Any]:
    """Measure a claim and return its record (plain data). Raises ValueError for no seeds, and where seeds give other figures.

    With a ``folder``, each finished seed is kept there until the record is saved there, and a run that was stopped goes on behind it.
    """
    from dither.quant.machine import machine

    chosen = tuple(dict.fromkeys(claim.seeds if seeds is None else seeds))
    if not chosen:
        raise ValueError("seeds: must name at least one")
    kept = _Kept(claim, folder)
    by_seed, seconds = [], 0.0
    for seed in chosen:
        if (found := kept.seeds.get(str(seed))) is not None:
            say(f"{claim.name}: seed {seed} was measured by a run that was stopped")
        else:
            say(f"{claim.name}: seed {seed}")
            started = time.perf_counter()
            found = {"figures": claim.measure(seed, say), "seconds": time.perf_counter() - started}
            kept.add(seed, found)
        by_seed.append(found["figures"])
        seconds += found["seconds"]
    if any(figures.keys() != by_seed[0].keys() for figures in by_seed):
        raise ValueError(f"claim {claim.name}: its seeds measured different figures")
    columns = {name: [figures[name] for figures in by_seed] for name in by_seed[0]}
    means = {name: statistics.fmean(values) for name, values in columns.items()}
    holds = [bool(test.passes(means)) for test in claim.tests]
    return {
        "claim": claim.name,
        "sentence": claim.sentence,
        "source": claim.source,
        "work": claim.work,
        "data": claim.data(),
        "paper": claim.paper,
        "figures": {
            name: {"mean": means[name], "spread": _spread(values), "values": values} for name, values in columns.items()
        },
        "tests": [{"says": test.says, "holds": held} for test, held in zip(claim.tests, holds, strict=True)],
        "verdict": verdict(holds),
        "caveat": claim.caveat,
        "seeds": list(chosen),
        "seconds": seconds,
        **machine(),
    }


class _Kept:
    """Figures of finished seeds on disk, for as long as no record holds them: ``folder/NAME.seeds.json``. Those of another work, other tests
    or other software are passed over; a change of the code alone is not seen."""

    def __init__(self, claim: Claim, folder: Path | None) -> None:
        from dither.quant.machine import machine
        from dither.quant.store import fingerprint

        self.path = None if folder is None else unfinished(folder, claim.name)
        self.seeds: dict[str, Any] = {}
        self.of = fingerprint(claim.name, claim.sentence, claim.work, claim.data(), [t.says for t in claim.tests], machine()["machine"])
        if self.path is not None and self.path.is_file():
            try:
                record = json.loads(self.path.read_text(encoding="utf-8"))
                self.seeds = dict(record["seeds"]) if record["of"] == self.of else {}
            except (OSError, ValueError, KeyError, TypeError):  # half a record is none
                self.seeds = {}

    def add(self, seed: int, found: dict[str, Any]) -> None:
        from dither.quant.store import explained, write_text
        from dither.quant.strict import dumps

        self.seeds[str(seed)] = found
        if self.path is not None and all(map(math.isfinite, found["figures"].values())):
            with explained(self.path):
                write_text(self.path, dumps({"of": self.of, "seeds": self.seeds}, 1) + "\n")


def unfinished(folder: Path, name: str) -> Path:
    """Where the seeds of a claim are kept until all are measured."""
    return folder / f"{name}.seeds.json"


def _spread(values: Sequence[float]) -> float | None:
    """Sample standard deviation over seeds; None of one value, or where a value is not finite."""
    return statistics.stdev(values) if len(values) > 1 and all(map(math.isfinite, values)) else None


def verdict(holds: Iterable[bool]) -> str:
    """``holds`` if all do, ``fails`` if none does, else ``holds in part``."""
    held = list(holds)
    return "holds" if all(held) else "holds in part" if any(held) else "fails"


def save(record: Mapping[str, Any], folder: Path | None = None) -> Path:
    """Store a record under its claim's name, whole or not at all: in ``folder``, else beside the claims, else (where the package cannot be
    written) in the user's data folder. Raises DitherError where none of them takes it."""
    from dither.quant.store import explained, write_text
    from dither.quant.strict import dumps

    path = (folder or home()) / f"{record['claim']}.json"
    with explained(path):
        write_text(path, dumps(record, 1) + "\n")
        unfinished(path.parent, record["claim"]).unlink(missing_ok=True)
    return path


def home() -> Path:
    """Where records are kept unless a folder is named."""
    return RECORDS if _writable(RECORDS) else user_folder()


def stored(name: str, folder: Path | None = None) -> dict[str, Any] | None:
    """The record of a claim, the latest where several are kept, or None where it was never measured. Raises CheckpointError where one is
    damaged."""
    paths = [place / f"{name}.json" for place in ([folder] if folder else [RECORDS, user_folder()])]
    records = [_read(path) for path in paths if path.is_file()]
    return max(records, key=lambda record: str(record["date"]), default=None)


def _read(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(record, dict) or not {"claim", "verdict", "date", "figures", "tests"} <= record.keys():
            raise ValueError("it is no record of a claim")
        return record
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: is damaged ({error}); remove it and measure the claim again") from None


def user_folder() -> Path:
    """``$XDG_DATA_HOME/dither/claims``, as the XDG base directory specification has it."""
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share") / "dither" / "claims"


def _writable(folder: Path) -> bool:
    """Whether files can be made in ``folder``, or in the nearest of its parents that exists."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return os.access(folder, os.W_OK | os.X_OK)


def find(name: str, claims: Mapping[str, Claim]) -> Claim:
    """The claim called ``name``. Raises UsageError that suggests the nearest."""
    if name in claims:
        return claims[name]
    near = difflib.get_close_matches(name.lower(), claims, n=1, cutoff=0.4)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    raise UsageError(f"claim {name!r}: is unknown{hint} The claims are {', '.join(claims)}")
