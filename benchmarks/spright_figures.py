"""Puts the figures of benchmarks/records/spright.json and fwht.json into docs/special.md, and draws docs/spright_*.svg. No figure is typed by hand.

    python benchmarks/spright_figures.py             writes
    python benchmarks/spright_figures.py --check     exit code 1 if a file is not what the records give
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from dither.report.curves import Points, Scale, curves
from dither.report.numbers import short

ROOT = Path(__file__).resolve().parent.parent
RECORDS = ROOT / "benchmarks" / "records"
PAGE = Path("docs") / "special.md"
NAMES = {"noiseless": "without noise", "nso": "nso", "so": "so", "ml": "ml"}

Row = dict[str, Any]


def marks(name: str) -> tuple[str, str]:
    return f"<!-- {name}:begin -->", f"<!-- {name}:end -->"


def placed(page: str, name: str, text: str) -> str:
    """``page`` with ``text`` between the marks of ``name``. Raises ValueError where it has not each mark once, in order."""
    begin, end = marks(name)
    if page.count(begin) != 1 or page.count(end) != 1 or page.index(begin) > page.index(end):
        raise ValueError(f"{PAGE}: must hold {begin} and {end} once, in this order")
    head, _, rest = page.partition(begin)
    return f"{head}{begin}\n{text}{end}{rest.partition(end)[2]}"


def table(head: str, align: str, rows: Iterable[Iterable[str]]) -> str:
    return "\n".join([f"| {head} |", f"|{align}|", *(f"| {' | '.join(row)} |" for row in rows)]) + "\n"


def where(record: Row) -> str:
    machine = record["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items() if name != "transformers")
    threads = f"{record['threads']} thread{'' if record['threads'] == 1 else 's'}"
    return f"\nMeasured on {machine['cpu']} with {threads} ({versions}) on {record['date'][:10]}.\n"


def milliseconds(seconds: float) -> str:
    return f"{short(1e3 * seconds)} ms"


def sparse_text(record: Row) -> str:
    """The tables of the sparse transform."""
    noise = table(
        "mode | SNR, dB | exact supports | recall | samples | of all | time", "---|--:|--:|--:|--:|--:|--:",
        ([NAMES[r["mode"]], "none" if r["snr"] is None else f"{r['snr']:g}", f"{100 * r['exact']:.0f} %", f"{r['recall']:.3f}",
          f"{r['samples']:,.0f}", f"{100 * r['samples'] / 2 ** r['n']:.2g} %", milliseconds(r["seconds"])] for r in record["noise"]),
    )  # fmt: skip
    sparsity = table(
        "mode | K | exact supports | recall | samples | of all | time", "---|--:|--:|--:|--:|--:|--:",
        ([NAMES[r["mode"]], f"{r['k']:,}", f"{100 * r['exact']:.0f} %", f"{r['recall']:.3f}", f"{r['samples']:,.0f}",
          f"{100 * r['samples'] / 2 ** r['n']:.2g} %", milliseconds(r["seconds"])] for r in record["sparsity"]),
    )  # fmt: skip
    exponents = table(
        "mode | SNR, dB | exponent of K | 95 % | exponent of n = log2 N | 95 %", "---|--:|--:|--:|--:|--:",
        ([NAMES[r["mode"]], "none" if r["snr"] is None else f"{r['snr']:g}",
          f"{r['k']['exponent']:.2f}", f"{r['k']['low']:.2f} to {r['k']['high']:.2f}",
          f"{r['n']['exponent']:.2f}", f"{r['n']['low']:.2f} to {r['n']['high']:.2f}"] for r in record["exponents"]),
    )  # fmt: skip
    cross = table(
        "n | all 2^n values | without noise | so | nso", "--:|--:|--:|--:|--:",
        ([str(r["n"]), milliseconds(r["full_seconds"]),
          *(f"{milliseconds(r['seconds'][m])} (x {short(r['times_faster'][m])})" for m in ("noiseless", "so", "nso"))] for r in record["crossover"]),
    )  # fmt: skip
    first, last, k = record["noise"][0], record["sparsity"][0], record["crossover"][0]["k"]
    cells = record["exponents"][0]["cells"]
    return (
        f"Against noise, n = {first['n']}, K = {first['k']}, {first['signals']} signals each:\n\n{noise}"
        f"\nAgainst K, n = {last['n']}, {record['sparsity'][-1]['signals']} signals each, noise at 10 dB in `so`:\n\n{sparsity}"
        f"\nThe fewest samples with which 9 of 10 supports are exact, as c K^a n^b over {cells} pairs of n and K:\n\n{exponents}"
        f"\nSeconds where the values lie in memory, K = {k}; in brackets, how many times faster than the full transform:\n\n{cross}"
        f"{where(record)}"
    )


def full_text(record: Row) -> str:
    """The table of transforms in place."""
    names = list(dict.fromkeys(name for r in record["rows"] for name in r["peers"]))
    rows = (
        [f"{r['rows']:,} x {r['length']:,}" + (f" ({r['order']} 2^k)" if r["order"] > 1 else ""), r["dtype"], f"{r['bytes'] / 1e6:.3g} MB",
         f"{r['additions'] / 1e6:.3g} M", f"{short(1e6 * r['seconds'])} us", f"{100 * r['share_of_bandwidth']:.0f} %",
         *(f"{r['peers'][name]['times_faster']:.2f}" if name in r["peers"] else "" for name in names)]
        for r in record["rows"]
    )  # fmt: skip
    head = f"rows | dtype | moved | additions | time | of bandwidth | {' | '.join(f'times faster than {name}' for name in names)}"
    made = table(head, "--:|---|--:|--:|--:|--:" + "|--:" * len(names), rows)
    return f"{made}\nBandwidth of reading and writing: {record['bandwidth'] / 1e9:.3g} GB/s.{where(record)}"


def series(rows: list[Row], x: str, y: str) -> dict[str, Points]:
    """A curve for each mode."""
    modes = dict.fromkeys(r["mode"] for r in rows)
    return {NAMES[m]: [(float(r[x]), float(r[y])) for r in rows if r["mode"] == m] for m in modes}


def drawings(record: Row) -> dict[Path, str]:
    cross: dict[str, Points] = {"all 2^n values": [(r["n"], r["full_seconds"]) for r in record["crossover"]]}
    for mode in ("noiseless", "so", "nso"):
        cross[NAMES[mode]] = [(r["n"], r["seconds"][mode]) for r in record["crossover"]]
    length, phase = record["length"], record["phase"]
    counted = series(length, "n", "samples") | {"all 2^n values": [(n, 2.0**n) for n in sorted({r["n"] for r in length})]}
    load = f"Exact supports against the load, n = {phase[0]['n']}, {phase[0]['bins'] // 3} bins in each of 3 groups"
    return {
        Path("docs") / "spright_phase.svg": curves(load, series(phase, "load", "exact"), Scale("K / B"), Scale("share of exact supports",
        reach=(0.0,))), Path("docs") / "spright_samples.svg": curves(
            f"Samples for K = {length[0]['k']} coefficients", counted, Scale("n = log2 N"), Scale("samples (log scale)", log=True)
        ),
        Path("docs") / "spright_time.svg": curves(
            f"Time for K = {record['crossover'][0]['k']} coefficients of a table in memory", cross, Scale("n = log2 N"),
            Scale("seconds (log scale)", log=True),
        ),
    }  # fmt: skip


def expected(root: Path = ROOT, records: Path = RECORDS) -> dict[Path, str]:
    """The files that the records give, by path under ``root``. Where there are no records, nothing is expected."""
    found: dict[Path, str] = {}
    page = (root / PAGE).read_text(encoding="utf-8")
    sparse, full = records / "spright.json", records / "fwht.json"
    if sparse.is_file():
        record = json.loads(sparse.read_text(encoding="utf-8"))
        page = placed(page, "spright", sparse_text(record))
        found |= drawings(record)
    if full.is_file():
        page = placed(page, "fwht", full_text(json.loads(full.read_text(encoding="utf-8"))))
    return found | {PAGE: page}


def main(arguments: list[str] | None = None, root: Path = ROOT, records: Path = RECORDS) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if a file is not what the records give")
    given = parser.parse_args(arguments)
    wrong = 0
    for path, text in expected(root, records).items():
        target = root / path
        same = target.is_file() and target.read_text(encoding="utf-8") == text
        if given.check and not same:
            print(f"{path}: is not what the records give; run python benchmarks/spright_figures.py", file=sys.stderr)
            wrong = 1
        elif not given.check:
            target.write_text(text, encoding="utf-8")
            print(path)
    return wrong


if __name__ == "__main__":
    sys.exit(main())
