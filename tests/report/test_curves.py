"""Curves as SVG: well-formed, every point drawn at its place, hostile names escaped."""

from __future__ import annotations

import math
import re
from itertools import pairwise
from xml.etree import ElementTree

import pytest

from dither.report.curves import Scale, curves


def test_points_lie_on_the_axes() -> None:
    """Powers of two over n on a log axis are a straight line, rising to the right."""
    text = curves("a <b> & c", {"x & y": [(n, 2.0**n) for n in range(4, 12)], "one": [(5, 50.0)]}, Scale("n"), Scale("samples", log=True))
    root = ElementTree.fromstring(text)
    assert root.tag.endswith("svg") and "a <b> & c" in "".join(root.itertext())
    lines = [e.get("d", "") for e in root.iter() if e.tag.endswith("path") and e.get("fill") == "none"]
    assert len(lines) == 1  # a lone point has no line
    places = [tuple(map(float, p.split())) for p in re.split("[ML]", lines[0])[1:]]
    steps = {(round(b[0] - a[0], 1), round(b[1] - a[1], 1)) for a, b in pairwise(places)}
    assert len(places) == 8 and max(s[0] for s in steps) - min(s[0] for s in steps) < 0.11 and all(s[1] < 0 for s in steps)
    assert max(s[1] for s in steps) - min(s[1] for s in steps) < 0.11
    marks = [e for e in root.iter() if (e.get("class") or "").startswith("mark")]
    assert len([m for m in marks if "key" not in m.get("class", "")]) == 9


def test_what_cannot_be_drawn_is_left_out() -> None:
    text = curves("h", {"a": [(1, 0.0), (2, 1.0), (3, math.inf), (4, 3.0)]}, Scale("x"), Scale("y", log=True, reach=(10.0,)))
    assert "a: 2, 1" in text and "a: 4, 3" in text and "a: 1, 0" not in text and "not finite" not in text
    with pytest.raises(ValueError, match=r"^series: "):
        curves("h", {"a": [(1, math.nan)]}, Scale("x"), Scale("y"))
