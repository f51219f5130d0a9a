"""The style sheets and the script that pages carry inside them."""

from __future__ import annotations

from functools import cache
from importlib.resources import files

from dither.report import palette


@cache
def asset(name: str) -> str:
    """A file of ``assets/``."""
    return (files("dither.report") / "assets" / name).read_text(encoding="utf-8")


def plot_style() -> str:
    """All that a plot needs: the colours and the look of its parts."""
    return palette.css() + asset("plot.css")
