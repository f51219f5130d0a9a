"""What each row took: bars of time, of processor time and of memory, each from zero, on its own linear scale."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from markupsafe import Markup

from dither.report import numbers
from dither.report.frame import SMALL
from dither.report.records import CompareRecord, Row
from dither.report.svg import Drawing, label, picture, tag
from dither.report.text import fit, width


@dataclass(frozen=True)
class Cost:
    """One panel of bars."""

    title: str
    of: Callable[[Row], float | None]
    show: Callable[[float | None], str]


COSTS = (
    Cost("time", lambda row: row.seconds, numbers.seconds),
    Cost("processor time", lambda row: row.cpu_seconds, numbers.seconds),
    Cost("peak memory", lambda row: row.peak_memory_bytes, numbers.size),
)


def costs(record: CompareRecord, uid: str) -> Drawing | None:
    """A panel for each cost that was measured, side by side where there is room. None if nothing was."""
    known = [cost for cost in COSTS if any(cost.of(row) is not None for row in record.rows)]
    if not known:
        return None
    return Drawing(_beside(record, known, f"{uid}w"), _stacked(record, known, f"{uid}n"))


def _beside(record: CompareRecord, known: list[Cost], uid: str) -> Markup:
    w = 760.0
    titles = [record.short_title(row) for row in record.rows]
    names = min(max((width(t, SMALL) for t in titles), default=0) + 10, 210)
    panel = (w - names) / len(known)
    parts: list[Markup] = []
    for k, title in enumerate(titles):
        parts.append(label(fit(title, names - 8, SMALL), names - 8, 34 + 20 * k, "end", "soft"))
    for p, cost in enumerate(known):
        left = names + p * panel
        parts.append(label(cost.title, left, 9, class_="soft"))
        parts += _bars(record, cost, left, panel - 14, 26, 20)
    return _finish(record, known, w, 30 + 20.0 * len(titles), uid, parts)


def _stacked(record: CompareRecord, known: list[Cost], uid: str) -> Markup:
    w = 340.0
    titles = [record.short_title(row) for row in record.rows]
    names = min(max((width(t, SMALL) for t in titles), default=0) + 10, 150)
    parts: list[Markup] = []
    y = 9.0
    for cost in known:
        parts.append(label(cost.title, 0, y, class_="soft"))
        for k, title in enumerate(titles):
            parts.append(label(fit(title, names - 8, SMALL), 0, y + 23 + 20 * k, class_="tick"))
        parts += _bars(record, cost, names, w - names, y + 15, 20)
        y += 20.0 * len(titles) + 36
    return _finish(record, known, w, y - 14, uid, parts)


def _bars(record: CompareRecord, cost: Cost, left: float, room: float, top: float, step: float) -> list[Markup]:
    texts = [cost.show(cost.of(row)) for row in record.rows]
    longest = max((width(text, SMALL) for text in texts), default=0) + 8
    most = max((cost.of(row) or 0.0 for row in record.rows), default=0.0)
    parts = [tag("line", x1=left, x2=left, y1=top - 3, y2=top + step * len(texts), class_="axis")]
    for k, (row, text) in enumerate(zip(record.rows, texts, strict=True)):
        amount = cost.of(row)
        length = (room - longest) * (amount or 0.0) / most if most > 0 else 0.0
        if amount is not None:
            hover = tag("title", f"{row.title}: {cost.title} {text}")
            parts.append(
                tag("rect", hover, x=left, y=top + step * k, width=max(length, 1.0), height=step - 7, class_="bar")
            )
        parts.append(label(text, left + length + 5, top + step * k + (step - 7) / 2, class_="tick"))
    return parts


def _finish(record: CompareRecord, known: list[Cost], w: float, h: float, uid: str, parts: list[Markup]) -> Markup:
    told = "; ".join(
        f"{record.short_title(row)}: " + ", ".join(f"{cost.title} {cost.show(cost.of(row))}" for cost in known)
        for row in record.rows
    )
    return picture(w, h, f"{record.model}: what each row took", told or "no rows", uid, *parts)
