"""Reports: tables, plots and one self-contained HTML file, drawn from plain records.

from dither import report
report.html(report.read_json("compare.json"), "compare.html")
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dither.report.markdown import markdown_table
    from dither.report.page import html, inspect_html
    from dither.report.pareto import pareto_front
    from dither.report.records import CompareRecord, Corpus, InspectLayer, InspectRecord, LayerRow, Machine, Row
    from dither.report.standalone import plot_svg
    from dither.report.store import read_json, to_csv, to_json
    from dither.report.terminal import terminal_table

# loaded when first used: rich, pydantic and jinja2 cost more than the rest of dither's import
_HOMES = {
    "markdown_table": "markdown",
    "html": "page",
    "inspect_html": "page",
    "plot_svg": "standalone",
    "pareto_front": "pareto",
    "CompareRecord": "records",
    "Corpus": "records",
    "InspectLayer": "records",
    "InspectRecord": "records",
    "LayerRow": "records",
    "Machine": "records",
    "Row": "records",
    "read_json": "store",
    "to_csv": "store",
    "to_json": "store",
    "terminal_table": "terminal",
}
__all__ = [
    "CompareRecord",
    "Corpus",
    "InspectLayer",
    "InspectRecord",
    "LayerRow",
    "Machine",
    "Row",
    "html",
    "inspect_html",
    "markdown_table",
    "pareto_front",
    "plot_svg",
    "read_json",
    "terminal_table",
    "to_csv",
    "to_json",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = getattr(importlib.import_module(f"dither.report.{_HOMES[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'dither.report' has no attribute {name!r}")
