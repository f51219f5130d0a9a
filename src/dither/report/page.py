"""One self-contained HTML file from one or more records.

Plots are drawn here, as inline SVG: the page shows everything without scripts. A small script adds sorting, tooltips
and a switch between light and dark. A content security policy forbids every fetch, so the file is the same on any
machine, with or without a network.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

import dither
from dither.report import numbers
from dither.report.costs import costs
from dither.report.heat import HeatScale
from dither.report.layers import by_block, by_role, layer_scale, sensitivity, sensitivity_scale
from dither.report.outliers import STATISTICS, outliers
from dither.report.records import CompareRecord, Corpus, InspectRecord, Machine, Row
from dither.report.store import write_text
from dither.report.style import asset, plot_style
from dither.report.tables import compare_table, inspect_table, most_sensitive, worst_layers
from dither.report.text import clean
from dither.report.tradeoff import excess, front, perplexity, tradeoff


def html(records: CompareRecord | Sequence[CompareRecord], path: str | Path) -> Path:
    """Write the report of one or more comparisons to ``path``. Raises DitherError where it cannot be written."""
    given = [records] if isinstance(records, CompareRecord) else list(records)
    title = f"{clean(given[0].model)} in few bits" if len(given) == 1 else f"{len(given)} comparisons"
    return _render(
        "compare.html.j2", path, title=title, sections=[_section(record, f"r{i}") for i, record in enumerate(given)]
    )


def inspect_html(record: InspectRecord, path: str | Path) -> Path:
    """Write the report of an inspection to ``path``. Raises DitherError where it cannot be written."""
    scale = sensitivity_scale(record)
    widths = record.widths
    return _render(
        "inspect.html.j2",
        path,
        title=f"{clean(record.model)}, looked at for few bits",
        summary=_inspect_summary(record),
        facts=_facts(record.calibration, None, record.machine, record.seed, f"{record.date:%Y-%m-%d %H:%M}"),
        notes=[clean(note) for note in record.notes],
        scheme=f" ({clean(record.scheme)})" if record.scheme else "",
        worst=most_sensitive(record) if widths else None,
        sensitivity=[sensitivity(record, bits, scale, f"s{bits}") for bits in widths],
        outliers=[drawing for k, s in enumerate(STATISTICS) if (drawing := outliers(record, s, f"o{k}")) is not None],
        table=inspect_table(record, record.layers),
    )


def _render(template: str, path: str | Path, **context: Any) -> Path:
    style = Markup(plot_style() + asset("page.css"))
    text = (
        _environment()
        .get_template(template)
        .render(style=style, script=Markup(asset("page.js")), version=dither.__version__, **context)
    )
    return write_text(path, text)


@cache
def _environment() -> Environment:
    return Environment(
        loader=PackageLoader("dither.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _facts(
    calibration: Corpus, evaluation: Corpus | None, machine: Machine, seed: int, date: str
) -> list[tuple[str, str]]:
    versions = ", ".join(f"{name} {version}" for name, version in machine.versions.items())
    items = [
        ("Calibration", calibration.describe()),
        ("Evaluation", evaluation.describe() if evaluation is not None else ""),
        ("Machine", f"{machine.cpu}, {machine.threads} thread{'' if machine.threads == 1 else 's'}"),
        ("Versions", versions),
        ("Seed and date", f"{seed}, {date}"),
    ]
    return [(name, clean(value)) for name, value in items if value]


def _section(record: CompareRecord, uid: str) -> dict[str, Any]:
    """Everything that the template shows of one comparison."""
    scale = layer_scale(record)
    return {
        "uid": uid,
        "heading": f"{clean(record.model)} on {clean(record.evaluation.text)}",
        "summary": _summary(record),
        "facts": _facts(
            record.calibration, record.evaluation, record.machine, record.seed, f"{record.date:%Y-%m-%d %H:%M}"
        ),
        "notes": [clean(note) for note in record.notes],
        "tradeoff": tradeoff(record, perplexity(record), f"{uid}p"),
        "excess": tradeoff(record, excess(), f"{uid}e")
        if any(row.excess_percent is not None for row in record.rows)
        else None,
        "table": compare_table(record),
        "layers": by_block(record, f"{uid}l"),
        "costs": costs(record, f"{uid}c"),
        "details": [_detail(row, scale, f"{uid}d{i}") for i, row in enumerate(record.rows) if row.layers or row.notes],
    }


def _summary(record: CompareRecord) -> str:
    """The result in one or two sentences."""
    reference, bits = numbers.perplexity(record.float_perplexity), record.float_bits_per_weight
    text = f"The float model has perplexity {reference} at {bits:g} bits per weight."
    best = sorted(front(record), key=lambda i: record.rows[i].perplexity or 0.0)
    if best:
        row = record.rows[best[0]]
        over = f" ({numbers.percent(row.excess_percent)})" if row.excess_percent is not None else ""
        found = f"{numbers.perplexity(row.perplexity)}{over} at {numbers.bits(row.bits_per_weight)} bits"
        text += f" The closest of {len(record.rows)} to it is {clean(row.title)}: {found}."
    failed = sum(row.status == "failed" for row in record.rows)
    return text + (f" {failed} of {len(record.rows)} failed." if failed else "")


def _detail(row: Row, scale: HeatScale, uid: str) -> dict[str, Any]:
    fallbacks = [f"{layer.name}: {layer.fallback}" for layer in row.layers if layer.fallback]
    return {
        "title": clean(row.title),
        "result": "failed" if row.status == "failed" else f"perplexity {numbers.perplexity(row.perplexity)}",
        "notes": [clean(note) for note in (*row.notes, *fallbacks)],
        "heat": by_role(row, scale, uid),
        "table": worst_layers(row) if row.layers else None,
    }


def _inspect_summary(record: InspectRecord) -> str:
    blocks = {layer.block for layer in record.layers if layer.block is not None}
    sites = sum(bool(layer.sites) for layer in record.layers)
    return (
        f"{len(record.layers)} layers in {len(blocks)} blocks; for {sites} of them a rewrite was proved that leaves "
        "the float model unchanged and can make rounding easier."
    )
