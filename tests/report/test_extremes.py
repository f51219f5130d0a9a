"""Any record that validates can be drawn: extreme, negative and missing figures break no page."""

from __future__ import annotations

import re
from datetime import UTC, datetime

from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from dither.report import (
    CompareRecord,
    Corpus,
    InspectLayer,
    InspectRecord,
    LayerRow,
    Machine,
    Row,
    markdown_table,
    terminal_table,
)
from dither.report.costs import costs
from dither.report.layers import by_block, by_role, layer_scale, sensitivity, sensitivity_scale
from dither.report.outliers import STATISTICS, outliers
from dither.report.svg import Drawing
from dither.report.tables import compare_table, inspect_table
from dither.report.tradeoff import excess, perplexity, tradeoff

number = st.none() | st.floats() | st.sampled_from([0.0, 1e-320, 1e308, -1.0, 18.3])
whole = st.none() | st.integers(0, 2**63)
width = st.floats(0, 1024) | st.sampled_from([2.3, 4.3])
word = st.text(max_size=12)
layer = st.builds(LayerRow, name=word, block=st.none() | st.integers(-1, 60), output_error=number, weight_error=number)
row = st.builds(
    Row,
    method=word,
    bits=width,
    group=st.none() | st.integers(1, 512),
    bits_per_weight=st.none() | width,
    perplexity=number,
    seconds=st.none() | st.floats(0, 1e12),
    cpu_seconds=st.none() | st.floats(0, 1e12),
    peak_memory_bytes=whole,
    layers=st.lists(layer, max_size=3).map(tuple),
    status=st.sampled_from(["ok", "failed"]),
)
inspected = st.builds(
    InspectLayer,
    name=word,
    block=st.none() | st.integers(-1, 60),
    input_max_over_median=number,
    input_kurtosis=number,
    weight_kurtosis=number,
    rtn_error=st.dictionaries(st.integers(2, 4), st.floats(), max_size=2),
)
CORPUS = Corpus(text="t")
MACHINE = Machine(cpu="c", threads=1)
DATE = datetime(2026, 11, 24, tzinfo=UTC)


def check(drawing: Drawing | str | None) -> None:
    """Every coordinate is a finite number of pixels."""
    texts = [drawing.wide, drawing.narrow] if isinstance(drawing, Drawing) else [drawing or ""]
    for text in texts:
        for name, value in re.findall(r' (d|x|y|x1|x2|y1|y2|width|height|viewBox)="([^"]*)"', text):
            assert "nan" not in value and "inf" not in value, (name, value)
            assert all(abs(float(n)) < 1e5 for n in re.findall(r"[-+]?[\d.]+(?:e[-+]?\d+)?", value)), (name, value)


@settings(deadline=None, max_examples=50)
@given(st.lists(row, max_size=5), st.floats())
def test_any_comparison_is_drawn(rows: list[Row], reference: float) -> None:
    record = CompareRecord(
        model="m", calibration=CORPUS, evaluation=CORPUS, float_perplexity=reference, float_bits_per_weight=16,
        machine=MACHINE, seed=0, date=DATE, rows=tuple(rows),
    )  # fmt: skip
    check(tradeoff(record, perplexity(record), "p"))
    check(tradeoff(record, excess(), "e"))
    check(by_block(record, "l"))
    check(costs(record, "c"))
    for k, item in enumerate(record.rows):
        check(by_role(item, layer_scale(record), f"d{k}"))
    assert len(compare_table(record).rows) == len(rows) + 1
    assert len(markdown_table(record).splitlines()) == len(rows) + 3
    assert terminal_table(record).row_count == len(rows) + 1
    with Console(quiet=True) as console:
        console.print(terminal_table(record))


@settings(deadline=None, max_examples=50)
@given(st.lists(inspected, max_size=6))
def test_any_inspection_is_drawn(layers: list[InspectLayer]) -> None:
    record = InspectRecord(model="m", calibration=CORPUS, machine=MACHINE, seed=0, date=DATE, layers=tuple(layers))
    for k, statistic in enumerate(STATISTICS):
        check(outliers(record, statistic, f"o{k}"))
    for bits in record.widths:
        check(sensitivity(record, bits, sensitivity_scale(record), f"s{bits}"))
    assert len(inspect_table(record, record.layers).rows) == len(layers)
    assert terminal_table(record).row_count == len(layers)
