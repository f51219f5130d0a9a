"""The pure parts of the plots: the Pareto front, ticks, labels, numbers, colours."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ElementTree
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from dither.report import CompareRecord, pareto_front, plot_svg
from dither.report import numbers as show
from dither.report.axes import Axis, linear_domain, log_domain
from dither.report.heat import HeatScale
from dither.report.labels import Box, Label, place
from dither.report.palette import COLOURS, DARK, HEAT_STEPS, LIGHT, contrast, css, shape
from dither.report.text import clean, fit, width
from dither.report.ticks import integer_ticks, linear_ticks, log_ticks
from dither.report.tradeoff import front

coordinate = st.integers(0, 6).map(float) | st.floats(allow_nan=True, allow_infinity=True)


@given(st.lists(st.tuples(coordinate, coordinate), max_size=25))
def test_pareto_front_is_what_brute_force_finds(points: list[tuple[float, float]]) -> None:
    finite = [i for i, p in enumerate(points) if all(map(math.isfinite, p))]

    def dominated(i: int) -> bool:
        (x, y) = points[i]
        return any(points[j][0] <= x and points[j][1] <= y and points[j] != points[i] for j in finite)

    found = pareto_front(points)
    assert sorted(found) == [i for i in finite if not dominated(i)]
    assert [points[i][0] for i in found] == sorted(points[i][0] for i in found)


def test_failed_rows_are_never_on_the_front(records: dict[str, CompareRecord]) -> None:
    assert front(records["hopeless"]) == {2}  # 1e30 is bad, yet finite
    typical = records["typical"]
    assert {typical.rows[i].method for i in front(typical)} == {"gptq", "awq+gptq"}


@given(st.floats(-1e12, 1e12), st.floats(1e-9, 1e12), st.integers(2, 15))
def test_linear_ticks_are_few_even_and_nice(lo: float, span: float, count: int) -> None:
    hi = lo + span
    assume(hi - lo > 1e-6 * max(abs(lo), abs(hi)))  # less apart than a label can tell
    ticks = linear_ticks(lo, hi, count)
    assert 1 <= len(ticks) <= count
    step_slack = 1e-6 * span
    assert all(lo - step_slack <= t <= hi + step_slack for t in ticks)
    if len(ticks) > 2:
        steps = [b - a for a, b in pairwise(ticks)]
        assert max(steps) - min(steps) <= 1e-6 * span
        mantissa = steps[0] / 10 ** math.floor(math.log10(steps[0]) + 1e-6)
        assert min(abs(mantissa - m) for m in (1, 2, 2.5, 5, 10)) < 1e-3


@given(st.floats(1e-12, 1e12), st.floats(1.2, 1e20), st.integers(3, 15))
def test_log_ticks_are_few_and_nice(lo: float, ratio: float, count: int) -> None:
    hi = lo * ratio
    ticks = log_ticks(lo, hi, count)
    assert 1 <= len(ticks) <= count
    assert ticks == sorted(set(ticks))
    assert all(lo * (1 - 1e-6) <= t <= hi * (1 + 1e-6) for t in ticks)
    for t in ticks:  # at most three significant digits
        assert float(f"{t:.3g}") == pytest.approx(t, rel=1e-9) or ratio < 10


def test_log_ticks_as_people_draw_them() -> None:
    assert log_ticks(17, 400, 10) == [20, 30, 50, 70, 100, 150, 200, 300]
    assert log_ticks(1e-4, 10, 8) == [1e-4, 1e-3, 1e-2, 0.1, 1, 10]
    assert log_ticks(18.1, 23.4, 6) == [19, 20, 21, 22, 23]
    assert log_ticks(1, 1e20, 6) == [1, 1e4, 1e8, 1e12, 1e16, 1e20]
    assert [show.tick(t) for t in log_ticks(1e-6, 1e6, 5)] == ["1e-6", "0.001", "1", "1,000", "1e6"]


@pytest.mark.parametrize(("lo", "hi"), [(1.0, 1.0), (2.0, 1.0), (math.nan, 1.0), (0.0, math.inf)])
def test_ticks_refuse_what_is_no_range(lo: float, hi: float) -> None:
    with pytest.raises(ValueError, match="lo, hi"):
        linear_ticks(lo, hi, 5)
    with pytest.raises(ValueError, match="lo, hi"):
        log_ticks(lo, hi, 5)


def test_integer_ticks() -> None:
    assert integer_ticks(0, 29, 6) == [0, 5, 10, 15, 20, 25]
    assert integer_ticks(0, 1, 8) == [0, 1]
    assert integer_ticks(4, 4, 8) == [4]


@given(st.lists(st.floats(1e-6, 1e6), max_size=8), st.booleans())
def test_axes_contain_their_values(values: list[float], log: bool) -> None:
    lo, hi = log_domain(values or [1.0], 1.25) if log else linear_domain(values, 1.0)
    assert lo < hi
    axis = Axis(lo, hi, 400, 20, log)
    assert all(20 < axis(v) < 400 for v in values)
    assert all(a <= b or axis(a) <= axis(b) for a in values for b in values)  # points up: larger is higher


marks = st.lists(st.tuples(st.floats(20, 380), st.floats(20, 280), st.floats(10, 120)), max_size=14)


@given(marks)
def test_labels_overlap_nothing(found: list[tuple[float, float, float]]) -> None:
    labels = [Label(x, y, w, 13) for x, y, w in found]
    obstacles = [Box(x - 6, y - 6, x + 6, y + 6) for x, y, _ in found]
    frame = Box(0, 0, 400, 300)
    placed = [p for p in place(labels, obstacles, frame) if p is not None]
    for k, p in enumerate(placed):
        assert p.box.inside(frame)
        assert not any(p.box.overlaps(o) for o in obstacles)
        assert not any(p.box.overlaps(q.box) for q in placed[:k])
        assert not any(q.box.crosses(*p.leader) for q in placed if p.leader is not None and q is not p)
    if len(found) == 1:
        assert len(placed) == 1


@given(st.tuples(*[st.floats(-9, 9)] * 4))
def test_crossing_agrees_with_sampling(ends: tuple[float, float, float, float]) -> None:
    x0, y0, x1, y1 = ends
    box = Box(-3, -2, 4, 5)
    walk = [(x0 + (x1 - x0) * t / 500, y0 + (y1 - y0) * t / 500) for t in range(501)]
    if any(box.x0 < x < box.x1 and box.y0 < y < box.y1 for x, y in walk):
        assert box.crosses((x0, y0), (x1, y1))
    elif not any(box.x0 - 0.1 < x < box.x1 + 0.1 and box.y0 - 0.1 < y < box.y1 + 0.1 for x, y in walk):
        assert not box.crosses((x0, y0), (x1, y1))


@given(st.text(max_size=60), st.floats(5, 300))
def test_fitted_text_fits_and_is_printable(text: str, room: float) -> None:
    flat = clean(text)
    assert all(c.isprintable() for c in flat)
    cut = fit(flat, room)
    assert cut == "…" or width(cut) <= room
    assert cut == flat or width(flat) > room


def test_numbers() -> None:
    shown = [show.perplexity(v) for v in (18.3, 275.06, 1234.4, 1.4e6, math.inf, math.nan, None)]
    assert shown == ["18.30", "275.1", "1,234", "1.4e6", "diverged", "diverged", "–"]
    assert [show.percent(v) for v in (11.34, -0.14, 1337.2, 49800.0, 7.65e9, None)] == [
        "+11.3 %",
        "-0.1 %",
        "+1,337 %",
        "x 499",
        "x 7.65e7",
        "–",
    ]
    assert [show.seconds(v) for v in (8.44, 99.94, 99.96, 3599.6, 7380, None)] == [
        "8.4 s",
        "99.9 s",
        "1 min 40 s",
        "1 h 00 min",
        "2 h 03 min",
        "–",
    ]
    assert [show.size(v) for v in (12, 96.4e6, 999.7e6, 1.116e9, 2.5e14, None)] == [
        "12 B",
        "96.4 MB",
        "1 GB",
        "1.12 GB",
        "250 TB",
        "–",
    ]
    assert [show.short(v) for v in (0, 0.01234, 99999, 1.23456e-6, 123456.0)] == [
        "0",
        "0.0123",
        "99999",
        "1.23e-6",
        "1.23e5",
    ]
    assert show.linear_labels([2.25, 2.5, 2.75, 3]) == ["2.25", "2.50", "2.75", "3.00"]


def test_colours_have_contrast_and_marks_differ() -> None:
    for colours in (LIGHT, DARK):
        for ground in ("bg", "mark"):
            assert contrast(colours["ink"], colours[ground]) >= 7
            for text in ("soft", "accent", "bad"):
                assert contrast(colours[text], colours[ground]) >= 4.5, (text, ground)
        assert all(contrast(colours[f"s{k}"], colours["bg"]) >= 3 for k in range(COLOURS))
    looks = {(k % COLOURS, k % 8) for k in range(40)}
    assert len(looks) == 40
    assert len({shape(k, 0, 0) for k in range(8)}) == 8
    assert contrast("#000000", "#ffffff") == pytest.approx(21)


def test_heat_runs_away_from_the_background() -> None:
    style = css()
    for block, ground in ((style.split("}")[0], "#ffffff"), (style.split("@media")[2], "#14171b")):
        cells = [block.split(f"--h{k}:")[1][:7] for k in range(HEAT_STEPS)]
        steps = [contrast(c, ground) for c in cells]
        assert steps == sorted(steps) and steps[-1] > 10
    scale = HeatScale(1e-4, 1.0)
    assert [scale.step(v) for v in (0.0, 1e-4, 1e-2, 1.0, 9.0, math.inf, None, math.nan)] == [
        0,
        0,
        5,
        9,
        9,
        9,
        None,
        None,
    ]
    assert HeatScale(1.0, 1.0).step(1.0) == 0


def test_the_plot_is_a_whole_svg_file(records: dict[str, CompareRecord], tmp_path: Path) -> None:
    for name, record in records.items():
        root = ElementTree.parse(plot_svg(record, tmp_path / f"{name}.svg")).getroot()
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        numbers = [float(v) for v in (root.get("viewBox") or "").split()]
        assert len(numbers) == 4 and numbers[2] > 300 and numbers[3] > 200
        marks = [
            e for e in root.iter() if (e.get("class") or "").startswith("mark") and "key" not in (e.get("class") or "")
        ]
        assert len(marks) == sum(row.status == "ok" and row.bits_per_weight is not None for row in record.rows), name
        words = ElementTree.tostring(root, encoding="unicode")
        assert "nan" not in "".join(e.get("d") or "" for e in root.iter()) and "inf" not in "".join(
            e.get("d") or "" for e in root.iter()
        )
        assert (
            "http" not in words.replace("http://www.w3.org/2000/svg", "")
            and "url(" not in words
            and "@import" not in words
        )
