"""Tables for a README."""

from __future__ import annotations

from dither.report import numbers
from dither.report.records import CompareRecord
from dither.report.text import clean
from dither.report.tradeoff import front


def markdown_table(record: CompareRecord) -> str:
    """The comparison as a GitHub-flavoured Markdown table, generated from a record for a README; ends with a
    newline."""
    lines = [
        "| method | bits | group | bits per weight | perplexity | over float | time | processor time | peak memory |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|",
        f"| float | {record.float_bits_per_weight:g} | | {numbers.bits(record.float_bits_per_weight)} "
        f"| {numbers.perplexity(record.float_perplexity)} | | | | |",
    ]
    best = front(record)
    for i, row in enumerate(record.rows):
        name = _markdown(row.method)
        group = "row" if row.group is None else str(row.group)
        result = "failed" if row.status == "failed" else numbers.perplexity(row.perplexity)
        cells = (
            f"**{name}**" if i in best else name,
            f"{row.bits:g}",
            group,
            numbers.bits(row.bits_per_weight),
            result,
            numbers.percent(row.excess_percent),
            numbers.seconds(row.seconds),
            numbers.seconds(row.cpu_seconds),
            numbers.size(row.peak_memory_bytes),
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _markdown(text: str) -> str:
    """Text that Markdown shows as it is."""
    return "".join("\\" + c if c in "\\`*_{}[]<>()#!|~" else "&amp;" if c == "&" else c for c in clean(text))
