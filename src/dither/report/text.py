"""Text that comes from outside: made printable, measured, and cut to fit."""

from __future__ import annotations

import unicodedata

_THIN = set("iljI.,:;'|! ")
_SLIM = set('frt()[]{}/\\-"`*')
_FAT = set("mwMW@%&") | {"—", "…", "∞"}


def clean(text: str) -> str:
    """One line without control characters, surrogates or direction overrides: safe for a terminal, for XML and for a
    table cell."""
    flat = " ".join(text.split())
    return "".join(
        "\N{REPLACEMENT CHARACTER}" if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Co", "Cn") else c for c in flat
    )


def width(text: str, size: float = 12.0) -> float:
    """An upper estimate, in pixels, of the width of ``text`` in a common sans serif font of ``size`` pixels.

    The classes follow DejaVu Sans, the widest of the fonts that systems ship, so text placed by this estimate does
    not collide elsewhere.
    """
    total = 0.0
    for c in text:
        if unicodedata.combining(c):
            continue
        if c in _THIN:
            total += 0.36
        elif c in _SLIM:
            total += 0.47
        elif c in _FAT:
            total += 1.02
        elif unicodedata.east_asian_width(c) in "WF":
            total += 1.36 if unicodedata.category(c) == "So" else 1.05
        else:
            total += 0.72 if c.isupper() else 0.65
    return total * size


def fit(text: str, room: float, size: float = 12.0) -> str:
    """``text``, or as much of its two ends as fits into ``room`` pixels around an ellipsis (ends tell layers and
    recipes apart)."""
    if width(text, size) <= room:
        return text
    for keep in range(len(text) - 1, 1, -1):
        head = (keep + 1) // 2
        cut = f"{text[:head]}…{text[len(text) - (keep - head) :]}"
        if width(cut, size) <= room:
            return cut
    return "…"
