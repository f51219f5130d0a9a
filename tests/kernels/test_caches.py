"""Cache sizes from made-up folders as Linux has them, and from this machine."""

from __future__ import annotations

from pathlib import Path

import pytest

from dither.kernels import caches, softmax_algorithm
from dither.kernels.caches import USUAL, cache_bytes


def test_from_the_system(tmp_path: Path) -> None:
    for i, (kind, level, size) in enumerate([("Data", 1, "48K"), ("Instruction", 1, "32K"), ("Unified", 2, "2M"), ("Unified", 3, "x")]):
        folder = tmp_path / f"index{i}"
        folder.mkdir()
        for name, value in (("type", kind), ("level", level), ("size", size)):
            (folder / name).write_text(f"{value}\n")
    assert cache_bytes(1, tmp_path) == 48 << 10
    assert cache_bytes(2, tmp_path) == 2 << 20
    assert cache_bytes(3, tmp_path) > 0  # its file is damaged, so it is the C library's word or the usual size


def test_where_nobody_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caches, "_configured", lambda level: 0)
    for level, size in USUAL.items():
        assert cache_bytes(level, tmp_path / str(level)) == size
    with pytest.raises(ValueError, match=r"^level: "):
        cache_bytes(0)


def test_here() -> None:
    assert 4 << 10 <= cache_bytes(1) <= cache_bytes(2) <= 1 << 30
    assert softmax_algorithm(1) == "reload" and softmax_algorithm(1 << 40) == "two_pass"
