"""The tables of a page: cells as text, with what they sort by."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from dither.report import numbers
from dither.report.records import CompareRecord, InspectLayer, InspectRecord, Row, role
from dither.report.text import clean
from dither.report.tradeoff import front

_WORST = 10  # layers listed as the most sensitive


@dataclass(frozen=True)
class Column:
    """A column of a table; ``text`` sorts by letters, else by numbers."""

    name: str
    text: bool = False


@dataclass(frozen=True)
class Cell:
    """``key`` is what the column sorts by: a plain number or text, empty for "unknown"."""

    text: str
    key: str = ""
    class_: str = ""
    hint: str = ""


@dataclass(frozen=True)
class Line:
    """A row of a table and how it stands out: "", "best", "float" or "bad"."""

    cells: tuple[Cell, ...]
    kind: str = ""


@dataclass(frozen=True)
class Grid:
    """A table."""

    columns: tuple[Column, ...]
    rows: tuple[Line, ...]


def _number(value: float | None, text: str) -> Cell:
    return Cell(text, "" if value is None or math.isnan(value) else repr(float(value)).replace("inf", "Infinity"))


def compare_table(record: CompareRecord) -> Grid:
    """Every row of a comparison, below the float model."""
    told = any(row.status == "failed" for row in record.rows)
    columns = [
        Column("method", True),
        Column("bits"),
        Column("perplexity"),
        Column("over float"),
        Column("bits per weight"),
        Column("group"),
        Column("time"),
        Column("processor time"),
        Column("peak memory"),
        Column("on disk"),
        Column("scheme", True),
    ] + ([Column("why it failed", True)] if told else [])
    bits = record.float_bits_per_weight
    reference = Line(
        (
            Cell("float", "", "text name"),
            _number(bits, f"{bits:g}"),
            _number(record.float_perplexity, numbers.perplexity(record.float_perplexity)),
            Cell(""),
            _number(bits, numbers.bits(bits)),
            *[Cell("")] * (len(columns) - 5),
        ),
        "float",
    )
    best = front(record)
    lines = [_compare_line(row, "best" if i in best else "", told) for i, row in enumerate(record.rows)]
    return Grid(tuple(columns), (reference, *lines))


def _compare_line(row: Row, kind: str, told: bool) -> Line:
    failed = row.status == "failed"
    method, scheme = clean(row.method), clean(row.scheme)
    cells = [
        Cell(method, method, "text name", method),
        _number(row.bits, f"{row.bits:g}"),
        Cell("failed", "", "bad") if failed else _number(row.perplexity, numbers.perplexity(row.perplexity)),
        _number(row.excess_percent, numbers.percent(row.excess_percent)),
        _number(row.bits_per_weight, numbers.bits(row.bits_per_weight)),
        _number(row.group, "row" if row.group is None else str(row.group)),
        _number(row.seconds, numbers.seconds(row.seconds)),
        _number(row.cpu_seconds, numbers.seconds(row.cpu_seconds)),
        _number(row.peak_memory_bytes, numbers.size(row.peak_memory_bytes)),
        _number(row.checkpoint_bytes, numbers.size(row.checkpoint_bytes)),
        Cell(scheme, scheme, "text", scheme),
    ]
    if told:
        reason = clean(row.reason or "") if failed else ""
        cells.append(Cell(reason, reason, "text why"))
    return Line(tuple(cells), kind)


def worst_layers(row: Row) -> Grid:
    """The layers of a row with the largest output error, largest first."""
    known = [layer for layer in row.layers if layer.error is not None]
    worst = sorted(known, key=lambda layer: -(layer.error or 0.0))[:_WORST]
    lines = tuple(
        Line(
            (
                *_layer_cells(layer.name, layer.block),
                _number(layer.output_error, numbers.short(layer.output_error)),
                _number(layer.weight_error, numbers.short(layer.weight_error)),
                _number(layer.damp, numbers.short(layer.damp)),
                _number(layer.tokens, f"{layer.tokens:,}"),
            )
        )
        for layer in worst
    )
    columns = (
        Column("layer", True),
        Column("block"),
        Column("output error"),
        Column("weight error"),
        Column("damping"),
        Column("tokens"),
    )
    return Grid(columns, lines)


def _layer_cells(name: str, block: int | None) -> tuple[Cell, Cell]:
    """What the layer is called within its block, and the block; the full name is a hint."""
    short, index = clean(role(name, block)), numbers.NOTHING if block is None else str(block)
    return Cell(short, short, "text name", clean(name)), _number(block, index)


def most_sensitive(record: InspectRecord) -> Grid:
    """The layers that lose most at the narrowest width, largest error first."""
    narrowest = record.widths[-1]
    known = [layer for layer in record.layers if narrowest in layer.rtn_error]
    return inspect_table(record, sorted(known, key=lambda layer: -layer.rtn_error[narrowest])[:_WORST])


def inspect_table(record: InspectRecord, layers: Sequence[InspectLayer]) -> Grid:
    """What is known of each of ``layers``."""
    widths = record.widths
    columns = (
        Column("layer", True),
        Column("block"),
        Column("shape"),
        *(Column(f"error at {bits} bits") for bits in widths),
        Column("max / median in"),
        Column("kurtosis in"),
        Column("kurtosis W"),
        Column("max |x| in"),
        Column("max |W|"),
        Column("sites", True),
        Column("notes", True),
    )
    return Grid(columns, tuple(_inspect_line(layer, widths) for layer in layers))


def _inspect_line(layer: InspectLayer, widths: Sequence[int]) -> Line:
    sites, notes = clean(", ".join(layer.sites)), clean("; ".join(layer.notes))
    statistics = (
        layer.input_max_over_median,
        layer.input_kurtosis,
        layer.weight_kurtosis,
        layer.input_absmax,
        layer.weight_absmax,
    )
    return Line(
        (
            *_layer_cells(layer.name, layer.block),
            _number(math.prod(layer.shape), " x ".join(map(str, layer.shape))),
            *(_number(layer.rtn_error.get(bits), numbers.short(layer.rtn_error.get(bits))) for bits in widths),
            *(_number(value, numbers.short(value)) for value in statistics),
            Cell(sites, sites, "text", sites),
            Cell(notes, notes, "text", notes),
        )
    )
