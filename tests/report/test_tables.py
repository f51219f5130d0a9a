"""Tables for terminals, READMEs and pages: literal names, every row there, nothing executed."""

from __future__ import annotations

import io
from html.parser import HTMLParser
from pathlib import Path

from rich.console import Console

from dither.report import CompareRecord, InspectRecord, html, inspect_html, markdown_table, terminal_table


def printed(record: CompareRecord | InspectRecord, columns: int = 200) -> str:
    out = io.StringIO()
    Console(file=out, width=columns, force_terminal=True, color_system="standard").print(terminal_table(record))
    return out.getvalue()


def test_terminal_tables(records: dict[str, CompareRecord], inspection: InspectRecord) -> None:
    shown = printed(records["typical"])
    for cell in (
        "18.30",
        "20.28",
        "+10.8 %",
        "4.33",
        "1 min 44 s",
        "970 MB",
        "wiki.test.tokens, 16 windows of 2048 tokens",
    ):
        assert cell in shown
    assert sum("awq+gptq" in line for line in shown.splitlines()) == 3
    assert "failed" in printed(records["hopeless"]) and "out of memory" in printed(records["hopeless"])
    shown = printed(inspection)
    assert "model.layers.29.mlp.down_proj" in shown and "lm_head" in shown and "2 bits" in shown


def test_a_terminal_sees_no_foreign_codes(records: dict[str, CompareRecord]) -> None:
    # the hostile name asks for red; a failed row is red by our own hand, so it is the foreign code that must be gone
    shown = printed(records["hostile"], 400)
    assert "\x1b[31m\u202e" not in shown and "\u202e" not in shown and "\x00" not in shown
    assert "<script>" in shown  # shown as it is, markup of rich included
    named = CompareRecord.model_validate(records["one"].model_dump() | {"model": "[bold]m[/bold] [/nothing]"})
    assert "[bold]m[/bold] [/nothing]" in printed(named)


def test_markdown(records: dict[str, CompareRecord]) -> None:
    lines = markdown_table(records["typical"]).splitlines()
    assert len(lines) == 3 + 12
    assert lines[2] == "| float | 16 | | 16.00 | 18.30 | | | | |"
    assert lines[12] == "| **awq+gptq** | 4 | 64 | 4.33 | 20.28 | +10.8 % | 72.0 s | 1 min 44 s | 970 MB |"
    for line in markdown_table(records["hostile"]).splitlines():
        cells = line.replace("\\|", "").split("|")
        assert len(cells) == 11 and "<" not in line.replace("\\<", "")


class Page(HTMLParser):
    """Collects elements, and addresses that a browser would load."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.loads: list[str] = []
        self.handlers: list[str] = []
        self.ids: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for key, value in attrs:
            if key in ("src", "href", "srcset", "action", "data", "poster", "xlink:href"):
                self.loads.append(value or "")
            if key.startswith("on"):
                self.handlers.append(key)
            if key == "id":
                self.ids.append(value or "")


def parsed(path: Path) -> Page:
    page = Page()
    page.feed(path.read_text(encoding="utf-8"))
    return page


def test_pages_load_nothing_and_run_nothing_foreign(
    records: dict[str, CompareRecord], inspection: InspectRecord, tmp_path: Path
) -> None:
    paths = [html(record, tmp_path / f"{name}.html") for name, record in records.items()]
    paths.append(html(list(records.values()), tmp_path / "all.html"))
    paths.append(inspect_html(inspection, tmp_path / "inspect.html"))
    hostile_inspection = InspectRecord.model_validate(
        inspection.model_dump()
        | {"layers": [{"name": records["hostile"].model, "notes": [records["hostile"].model], "sites": ["<b>"]}]}
    )
    paths.append(inspect_html(hostile_inspection, tmp_path / "inspect-hostile.html"))
    for path in paths:
        page = parsed(path)
        assert page.tags.count("script") == 1 and "img" not in page.tags and "b" not in page.tags, path.name
        assert all(address == "data:," or address.startswith("#") for address in page.loads), path.name
        assert not page.handlers and len(page.ids) == len(set(page.ids)), path.name
        text = path.read_text(encoding="utf-8")
        assert "url(" not in text and "@import" not in text and "\x00" not in text and "\u202e" not in text


def test_a_page_shows_every_row_and_reason(records: dict[str, CompareRecord], tmp_path: Path) -> None:
    text = html(records["crowded"], tmp_path / "c.html").read_text(encoding="utf-8")
    assert text.count(">Cholesky: damping grew to 1 and the factorisation still failed</td>") == 3
    assert text.count('<td data-key="rotation+awq+clipping+gptq+variant-') == 40
    assert "diverged" in text and "3 of 40 failed" in text
    both = html([records["one"], records["typical"]], tmp_path / "b.html").read_text(encoding="utf-8")
    assert "2 comparisons" in both and 'href="#r1"' in both
