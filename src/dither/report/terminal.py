"""Tables for a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dither.report import numbers
from dither.report.records import CompareRecord, InspectRecord
from dither.report.text import clean
from dither.report.tradeoff import front

if TYPE_CHECKING:
    from rich.table import Table


def terminal_table(record: CompareRecord | InspectRecord) -> Table:
    """The record as a rich table. Names are taken literally: no markup, no control characters. Rows on the Pareto
    front are bold."""
    return _compare(record) if isinstance(record, CompareRecord) else _inspect(record)


def _table(title: str, caption: str, left: tuple[str, ...], right: tuple[str, ...], last: str | None = None) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(
        title=Text(clean(title)),
        caption=Text(clean(caption)),
        box=box.SIMPLE_HEAD,
        title_justify="left",
        caption_justify="left",
    )
    for name in left:
        table.add_column(name, no_wrap=True, overflow="ellipsis", max_width=40)
    for name in right:
        table.add_column(name, justify="right", no_wrap=True)
    if last is not None:
        table.add_column(last)
    return table


def _compare(record: CompareRecord) -> Table:
    from rich.text import Text

    title = f"{record.model}: perplexity on {record.evaluation.describe()}"
    told = any(row.status == "failed" for row in record.rows)
    best = front(record)
    marked = "bold: on the Pareto front; " if best else ""
    table = _table(
        title,
        f"{marked}calibrated on {record.calibration.describe()}, seed {record.seed}",
        ("method",),
        ("bits", "group", "bits/weight", "perplexity", "over float", "time", "CPU", "memory", "size"),
        "" if told else None,
    )
    last = [""] if told else []
    table.add_row(
        "float",
        f"{record.float_bits_per_weight:g}",
        "",
        numbers.bits(record.float_bits_per_weight),
        numbers.perplexity(record.float_perplexity),
        "",
        "",
        "",
        "",
        "",
        *last,
        style="dim",
    )
    for i, row in enumerate(record.rows):
        failed = row.status == "failed"
        cells = [
            f"{row.bits:g}",
            "row" if row.group is None else str(row.group),
            numbers.bits(row.bits_per_weight),
            "failed" if failed else numbers.perplexity(row.perplexity),
            numbers.percent(row.excess_percent),
            numbers.seconds(row.seconds),
            numbers.seconds(row.cpu_seconds),
            numbers.size(row.peak_memory_bytes),
            numbers.size(row.checkpoint_bytes),
        ]
        reason = [Text(clean(row.reason or "") if failed else "")] if told else []
        table.add_row(
            Text(clean(row.method)), *cells, *reason, style="red" if failed else "bold" if i in best else None
        )
    return table


def _inspect(record: InspectRecord) -> Table:
    from rich.text import Text

    widths = record.widths
    where = f" ({record.scheme})" if record.scheme else ""
    table = _table(
        f"{record.model}: layers, outliers of inputs, and error of rounding to nearest{where}",
        f"inputs of {record.calibration.describe()}",
        ("layer",),
        ("shape", "max/median", "kurt. in", "kurt. W", *(f"{bits} bits" for bits in widths)),
        "sites",
    )
    for layer in record.layers:
        cells = [
            "x".join(map(str, layer.shape)),
            numbers.short(layer.input_max_over_median),
            numbers.short(layer.input_kurtosis),
            numbers.short(layer.weight_kurtosis),
            *(numbers.short(layer.rtn_error.get(bits)) for bits in widths),
        ]
        table.add_row(Text(clean(layer.name)), *cells, Text(clean(", ".join(layer.sites)) or numbers.NOTHING))
    return table
