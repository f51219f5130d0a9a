"""``dither swht`` on files of numpy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dither.cli.main import main
from dither.special import fwht


def call(*arguments: object) -> int:
    with pytest.raises(SystemExit) as done:
        main(["swht", *map(str, arguments)])
    assert isinstance(done.value.code, int)
    return done.value.code


@pytest.fixture
def spectrum() -> np.ndarray:
    x = np.zeros(1 << 12)
    x[[0, 5, 1030, 4095]] = [2.5, -1, 4, 0.125]
    return x


def test_the_largest_first(tmp_path: Path, spectrum: np.ndarray, capsys: pytest.CaptureFixture[str]) -> None:
    np.savez(tmp_path / "a.npz", f=fwht(spectrum), other=np.zeros(2))
    assert call("--npz", tmp_path / "a.npz", "--k", 8, "--top", 3, "-o", tmp_path / "found.npz") == 0
    lines = capsys.readouterr().out.splitlines()
    assert "4 coefficients from" in lines[0] and "24 of 24 bins explained" in lines[1]
    assert [line.split() for line in lines[2:]] == [["1030", "4", "1,2,10"], ["0", "2.5", "constant"], ["5", "-1", "0,2"]]
    with np.load(tmp_path / "found.npz", allow_pickle=False) as found:
        assert found["support"].tolist() == [1030, 0, 5, 4095]
        np.testing.assert_allclose(found["values"], [4, 2.5, -1, 0.125], atol=1e-12)


@pytest.mark.parametrize("factor", [1.0, 1j])
def test_json(tmp_path: Path, spectrum: np.ndarray, factor: complex, capsys: pytest.CaptureFixture[str]) -> None:
    noise = 0.1 * np.random.default_rng(0).standard_normal((4096, 2)) @ np.array([1, 0] if factor == 1 else [0.5**0.5, 0.5**0.5 * 1j])
    np.savez(tmp_path / "a.npz", fwht(factor * spectrum) + noise)
    assert call("--npz", tmp_path / "a.npz", "--sigma", "auto", "--mode", "so", "--k", 8, "--json") == 0
    record: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert record["complete"] and record["mode"] == "so" and record["n"] == 12
    assert record["sigma"] == pytest.approx(0.1, rel=0.2) and 0 < record["queries"] < 4096
    assert [row["mask"] for row in record["largest"]] == [1030, 0, 5, 4095]
    value = record["largest"][0]["value"]
    assert (value if factor == 1 else value[1]) == pytest.approx(4, abs=0.02)


def test_wrong_files_and_options(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.savez(tmp_path / "two.npz", a=np.zeros(4), b=np.zeros(4))
    np.savez(tmp_path / "text.npz", np.array(["x", "y"]))
    np.savez(tmp_path / "objects.npz", np.array([{}, {}], dtype=object))
    np.savez(tmp_path / "twelve.npz", np.zeros(12))
    np.savez(tmp_path / "good.npz", np.zeros(64))
    np.save(tmp_path / "single.npy", np.zeros(4))
    (tmp_path / "broken.npz").write_bytes(b"PK\x03\x04nothing")
    (tmp_path / "empty.npz").write_bytes(b"")
    for name, text, code in [
        ("two.npz", "a, b; must hold 'f'", 1),
        ("text.npz", "must hold numbers", 1),
        ("objects.npz", "objects.npz: ", 1),
        ("twelve.npz", "f: shape [12]", 1),
        ("single.npy", "numpy.savez", 1),
        ("broken.npz", "broken.npz: ", 1),
        ("empty.npz", "empty.npz: ", 1),
        ("missing.npz", "missing.npz", 1),
    ]:
        assert call("--npz", tmp_path / name) == code
        err = capsys.readouterr().err
        assert text in err and err.count("\n") == 1, err
    for options, text in [(["--sigma", "much"], "--sigma much"), (["--mode", "best"], "mode: 'best'"), (["--k", "60"], "use fwht")]:
        assert call("--npz", tmp_path / "good.npz", *options) in (1, 2)
        assert text in capsys.readouterr().err
