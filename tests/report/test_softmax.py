"""Tables and plot of softmax from a made-up record."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from typing import Any

from dither.report.softmax import NAMES, softmax_svg, softmax_tables


def part(rows: list[dict[str, Any]]) -> dict[str, Any]:
    machine = {"cpu": "Example CPU", "threads": 2, "versions": {"dither": "0.1.0"}}
    return {"machine": machine, "date": "2026-11-28T00:00:00+00:00", "caches": [48 << 10, 1 << 20, 32 << 20], "rows": rows}


def timed(size: int, isa: str, threads: int) -> dict[str, Any]:
    numbers = size // 4
    seconds = {name: numbers * 1e-9 * (i + 2) / 8 for i, name in enumerate(NAMES)}
    return {
        "bytes": size, "numbers": numbers, "isa": isa, "threads": threads, "auto": "two_pass", "seconds": seconds,
        "streams": {"read": 1.0, "copy": 2 * size / 30e9, "update": 1.0}, "bytes_a_second": {"two_pass": 15e9},
    }  # fmt: skip


RECORD = {
    "float32": part([timed(size, isa, threads) for size in (4 << 10, 1 << 30) for isa in ("avx512", "avx2") for threads in (1, 2)]),
    "errors": part([{"isa": "avx512", "algorithm": "two_pass", "ulp": {"normal": 2.5, "masked": 3.0}}]),
    "use": part([
        {"work": "a loss", "state": "called", "threads": 1, "ours": 2e-3, "torch": 3e-3, "times_faster": 1.5},
        {"work": "a choice", "state": "", "threads": 1, "torch": 8e-4},
    ]),
}  # fmt: skip


def test_tables() -> None:
    text = softmax_tables(RECORD)
    assert "| 1 GiB | avx2 | 2 | 0.250 | 0.375 | 0.500 | 0.625 | 0.750 | 1.50 | 3.00 | 15.0 | 0.50 | two_pass |" in text
    assert "caches: 48 KiB, 1 MiB, 32 MiB" in text and "bfloat16" not in text
    assert "| avx512 | two_pass | 2.50 | 3.00 |" in text
    assert "| a loss | 1 | 3,000.0 us | 2,000.0 us | 1.50 | called |" in text and "| a choice | 1 | 800.0 us | – | – |  |" in text
    assert text.count("Measured on Example CPU (dither 0.1.0) on 2026-11-28.") == 3
    assert text.startswith("![") and "(softmax.svg)" in text
    assert softmax_tables({}) == ""


def test_the_plot_shows_one_thread_of_the_first_instruction_set() -> None:
    svg = softmax_svg(RECORD)
    root = ET.fromstring(svg)
    tips = [tip.text for tip in root.iter("{http://www.w3.org/2000/svg}title")][1:]
    assert len(tips) == 2 * len(NAMES) and "two_pass, 4 KiB: 0.250 ns" in tips and "torch, 1 GiB: 0.750 ns" in tips
    assert "avx512" in svg and "avx2" not in svg
