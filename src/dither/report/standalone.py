"""The picture of a comparison as an SVG file of its own, for a README."""

from __future__ import annotations

from pathlib import Path

from markupsafe import Markup

from dither.report.records import CompareRecord
from dither.report.store import write_text
from dither.report.style import plot_style
from dither.report.svg import picture, tag
from dither.report.tradeoff import perplexity, sketch

_MARGIN = 14.0


def plot_svg(record: CompareRecord, path: str | Path) -> Path:
    """Write perplexity against bits per weight to ``path``. The picture has a background of its own, light or dark by
    the reader's setting, so it reads on any page. Raises DitherError where it cannot be written."""
    heading = (record.model, f"perplexity on {record.evaluation.describe()}")
    drawn = sketch(record, perplexity(record), 760, 350, heading)
    edge = _MARGIN - 1
    w, h = drawn.width + 2 * edge, drawn.height + 2 * edge
    card = tag("rect", x=-edge, y=-edge, width=w, height=h, rx=8, fill="var(--bg)", stroke="var(--line)")
    style = tag("style", Markup(plot_style()))
    parts = (style, card, *drawn.parts)
    svg = picture(drawn.width, drawn.height, drawn.title, drawn.description, "plot", *parts, margin=_MARGIN)
    return write_text(path, svg + "\n")
