"""Puts measured figures into the documents. No figure is typed by hand: this is the only way in.

    python benchmarks/readme.py compare/compare.json     the table in README.md and docs/plot.svg, from a comparison's record
    python benchmarks/readme.py --claims                 docs/claims.md, from the stored records of claims
    python benchmarks/readme.py --special                the tables and plots of docs/special.md, from benchmarks/records/
    python benchmarks/readme.py --speed                  the tables of docs/speed.md and the short one of README.md, likewise
    python benchmarks/readme.py --exports                the table in docs/exports.md, from the record of benchmarks/export_perplexity.py
    python benchmarks/readme.py --check                  exit code 1 if README.md or docs/ are not what the records give

The comparison's record is kept as docs/record.json, without its layers, so that --check can make the table and the plot again anywhere.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dither import claims, report
from dither.claims.claim import RECORDS
from dither.report import CompareRecord, numbers, speed
from dither.report.exports import export_tables
from dither.report.log_bessel import log_bessel_gpu_tables, log_bessel_svg, log_bessel_tables, von_mises_fisher_tables
from dither.report.softmax import softmax_svg, softmax_tables

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- record:begin -->", "<!-- record:end -->"


def section(record: CompareRecord) -> str:
    """What stands between the marks: the table, and a line that says how, where and when."""
    machine = record.machine
    versions = ", ".join(f"{name} {version}" for name, version in machine.versions.items())
    lines = [
        report.markdown_table(record),
        f"{record.model}: perplexity on {record.evaluation.describe()}; calibrated on {record.calibration.describe()}; "
        f"seed {record.seed}. Bold: on the Pareto front of bits and perplexity. Measured on {machine.cpu} with "
        f"{machine.threads} thread{'' if machine.threads == 1 else 's'} ({versions}) on {record.date:%Y-%m-%d}.",
    ]
    return "\n".join(lines) + "\n"


def with_section(readme: str, text: str, begin: str = BEGIN, end: str = END, name: str = "README.md") -> str:
    """``readme`` with ``text`` between its marks. Raises ValueError where it has not each mark once, in order."""
    if readme.count(begin) != 1 or readme.count(end) != 1 or readme.index(begin) > readme.index(end):
        raise ValueError(f"{name}: must hold {begin} and {end} once, in this order")
    head, _, rest = readme.partition(begin)
    return f"{head}{begin}\n{text}{end}{rest.partition(end)[2]}"


def plot(record: CompareRecord) -> str:
    """The picture as SVG."""
    with tempfile.TemporaryDirectory() as folder:
        return report.plot_svg(record, Path(folder) / "plot.svg").read_text(encoding="utf-8")


def without_layers(record: CompareRecord) -> CompareRecord:
    """What the table and the plot need of a record."""
    rows = tuple(row.model_copy(update={"layers": ()}) for row in record.rows)
    return record.model_copy(update={"rows": rows})


def claims_page(records: Mapping[str, Mapping[str, Any]]) -> str:
    """docs/claims.md: what papers say, what was measured, and whether it holds here."""
    parts = [
        "# Claims\n",
        "What papers say, measured again by `dither claims run NAME` on work of a size that fits a small machine. A claim is a few tests; "
        "all passed: it *holds*; some: it *holds in part*; none: it *fails*. A claim that does not hold here is listed all the same. "
        "Papers measured other models, so their figures show the direction, not the value to expect. This page is made by "
        "`python benchmarks/readme.py --claims`.\n",
        "| claim | verdict | tests passed | measured |\n|---|---|--:|---|",
        "\n".join(_line(record) for record in records.values()) + "\n",
    ]
    return "\n".join([*parts, *(_claim(record) for record in records.values())])


def _line(record: Mapping[str, Any]) -> str:
    passed = sum(test["holds"] for test in record["tests"])
    return f"| [{record['claim']}](#{record['claim']}) | {record['verdict']} | {passed} of {len(record['tests'])} | {record['date'][:10]} |"


def _claim(record: Mapping[str, Any]) -> str:
    machine = record["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    seeds = ", ".join(map(str, record["seeds"]))
    lines = [
        f"## {record['claim']}\n",
        f"> {record['sentence']}\n>\n> {record['source']}\n",
        f"**{record['verdict'].capitalize()}**, measured on {record['work']}. Text: {record['data']}. Seeds {seeds}.\n",
        *(f"- {'holds' if test['holds'] else '**does not hold**'}: {test['says']}" for test in record["tests"]),
        "\n| paper | figure |\n|---|--:|",
        *(f"| {name} | {value:g} |" for name, value in record["paper"].items()),
        "\n| measured here | mean | spread over seeds |\n|---|--:|--:|",
        *(f"| {name} | {_figure(f['mean'])} | {_figure(f['spread'])} |" for name, f in record["figures"].items()),
        *([f"\n{record['caveat']}"] if record["caveat"] else []),
        f"\n{numbers.seconds(record['seconds'])} on {machine['cpu']}, {machine['threads']} threads ({versions}), "
        f"{record['date'][:10]}.\n",
    ]
    return "\n".join(lines)


def _figure(value: float | str | None) -> str:
    return numbers.NOTHING if value is None else numbers.short(float(value))


# of docs/speed.md, by record: what stands between its marks
SPEED: dict[str, Callable[[Any], str]] = {
    "decode": speed.decode,
    "decode_one_thread": speed.decode,
    "packed_matmul": speed.packed_matmul,
    "packed_gemm": speed.packed_gemm,
    "int8_matmul": speed.int8_matmul,
    "lookup_matmul": speed.lookup_matmul,
    "first_token": speed.first_token,
    "load_memory": speed.load_memory,
    "serve": speed.serve,
    "kv_memory": speed.kv_memory,
    "quantize_peer": speed.quantize_peer,
}
# of a page, by record: what stands between its marks, and its plot (None where the record has not what it shows)
Parts = dict[str, tuple[Callable[[Any], str], Callable[[Any], str | None] | None]]
SPECIAL: Parts = {
    "softmax": (softmax_tables, lambda record: softmax_svg(record) if "float32" in record else None),
    "log_bessel": (log_bessel_tables, log_bessel_svg),
    "log_bessel_gpu": (log_bessel_gpu_tables, None),
    "von_mises_fisher": (von_mises_fisher_tables, None),
}
EXPORTS: Parts = {"export_perplexity": (export_tables, None)}


def speed_page(root: Path) -> dict[Path, str]:
    """docs/speed.md with the tables of the benchmarks that have a record."""
    page = root / "docs" / "speed.md"
    if not page.is_file():
        return {}
    text = page.read_text(encoding="utf-8")
    for name, table in SPEED.items():
        stored = root / "benchmarks" / "records" / f"{name}.json"
        if stored.is_file():
            marks = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
            text = with_section(text, table(json.loads(stored.read_text(encoding="utf-8"))), *marks, page.name)
    return {page: text}


def special_page(root: Path) -> dict[Path, str]:
    """docs/special.md with the tables of the benchmarks of numerics that have a record, and their plots."""
    return _page(root, "special.md", SPECIAL)


def exports_page(root: Path) -> dict[Path, str]:
    """docs/exports.md with the perplexity of exports in other programs, where it was measured."""
    return _page(root, "exports.md", EXPORTS)


def _page(root: Path, page_name: str, parts: Parts) -> dict[Path, str]:
    found: dict[Path, str] = {}
    page = root / "docs" / page_name
    for name, (tables, drawing) in parts.items():
        stored = root / "benchmarks" / "records" / f"{name}.json"
        if not (page.is_file() and stored.is_file()):
            continue
        text = found.get(page) or page.read_text(encoding="utf-8")
        record = json.loads(stored.read_text(encoding="utf-8"))
        marks = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
        found[page] = with_section(text, tables(record), *marks, page.name)
        if drawing is not None and (drawn := drawing(record)) is not None:
            found[root / "docs" / f"{name}.svg"] = drawn
    return found


def expected(root: Path, records: Path = RECORDS) -> dict[Path, str]:
    """The files that the stored records give, by path. Where there are no records, nothing is expected."""
    found: dict[Path, str] = special_page(root) | exports_page(root) | speed_page(root)
    stored = root / "docs" / "record.json"
    if stored.is_file():
        record = report.read_json(stored)
        if not isinstance(record, CompareRecord):
            raise ValueError(f"{stored}: is no record of a comparison")
        readme = root / "README.md"
        text = with_section(readme.read_text(encoding="utf-8"), section(record))
        decode = root / "benchmarks" / "records" / "decode.json"
        if decode.is_file():
            text = with_section(text, speed.summary(json.loads(decode.read_text(encoding="utf-8"))), "<!-- decode:begin -->", "<!-- decode:end -->")
        found[readme] = text
        found[root / "docs" / "plot.svg"] = plot(record)
    measured = {name: kept for name in claims.CLAIMS if (kept := claims.stored(name, records)) is not None}
    if measured:
        found[root / "docs" / "claims.md"] = claims_page(measured)
    return found


def stale(root: Path, records: Path = RECORDS) -> list[Path]:
    """The files that are not what the records give."""
    return [
        path
        for path, text in expected(root, records).items()
        if not path.is_file() or path.read_text(encoding="utf-8") != text
    ]


def main(arguments: list[str] | None = None, root: Path = ROOT, records: Path = RECORDS) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(description="Put measured figures into README.md and docs/.")
    parser.add_argument("record", nargs="?", type=Path, help="compare.json of a comparison")
    parser.add_argument("--claims", action="store_true", help="write docs/claims.md from the stored claim records")
    parser.add_argument("--special", action="store_true", help="write the tables and plots of docs/special.md from benchmarks/records/")
    parser.add_argument("--speed", action="store_true", help="write the tables of docs/speed.md from benchmarks/records/")
    parser.add_argument("--exports", action="store_true", help="write the table of docs/exports.md from benchmarks/records/")
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if a file is not what the records give")
    given = parser.parse_args(arguments)
    if given.check:
        wrong = stale(root, records)
        for path in wrong:
            print(f"{path.relative_to(root)}: is not what the records give; run python benchmarks/readme.py", file=sys.stderr)
        return 1 if wrong else 0
    if given.record is None and not (given.claims or given.special or given.speed or given.exports):
        parser.error("give compare.json, --claims, --special, --speed, --exports or --check")
    if given.record is not None:
        record = report.read_json(given.record)
        if not isinstance(record, CompareRecord):
            parser.error(f"{given.record}: is no record of a comparison")
        report.to_json(without_layers(record), root / "docs" / "record.json")
    wanted = expected(root, records)
    readme, page, special = root / "README.md", root / "docs" / "claims.md", special_page(root).keys()
    exports = exports_page(root).keys()
    chosen: set[Path] = {page} if given.claims else set()
    chosen |= special if given.special else set()
    chosen |= exports if given.exports else set()
    chosen |= {*speed_page(root), readme} if given.speed else set()
    chosen |= {readme, root / "docs" / "plot.svg"} if given.record is not None else set()
    for path, text in wanted.items():
        if path in chosen:
            path.write_text(text, encoding="utf-8")
            print(path.relative_to(root))
    if given.claims and page not in wanted:
        parser.error("no claim was measured yet; run dither claims run NAME")
    if given.special and not special:
        parser.error("nothing was measured yet; run python benchmarks/softmax.py or log_bessel.py")
    if given.exports and not exports:
        parser.error("nothing was measured yet; run python benchmarks/export_perplexity.py")
    return 0


if __name__ == "__main__":
    sys.exit(main())
