"""``dither bessel`` in this process: values, regions, JSON, and wrong calls."""

from __future__ import annotations

import json

import pytest

from dither.claims.bessel_oracle import exact, mixed_error
from dither.cli.main import main


def call(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stopped:
        main(["bessel", *arguments])
    return int(stopped.value.code or 0)


def test_a_value_and_its_region(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("logiv", "--v", "16383", "--x", "72000") == 0
    value, region = capsys.readouterr().out.split()
    assert region == "U_7" and mixed_error(float(value), exact("I", 16383.0, 72000.0)[0]) < 1e-15
    assert call("logkv", "--v", "2", "--x", "31", "--table", "paper", "--json") == 0
    record = json.loads(capsys.readouterr().out)
    assert record["region"] == "mu_20" and record["v"] == 2 and mixed_error(record["value"], exact("K", 2.0, 31.0)[0]) < 1e-15
    assert call("ratio", "--v", "0.5", "--x", "0.25") == 0
    assert capsys.readouterr().out.split()[1] == "small_1"


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (("logiv", "--v", "-1", "--x", "2"), 1, "v: must not be negative"),
        (("logjv", "--v", "1", "--x", "2"), 2, "must be logiv, logkv or ratio"),
        (("ratio", "--v", "1", "--x", "2", "--table", "paper"), 2, "--table"),
        (("logiv", "--v", "1", "--x", "2", "--table", "loose"), 1, "table: must be"),
        (("logiv", "--v", "1"), 2, "--x"),
    ],
)
def test_wrong_calls(arguments: tuple[str, ...], code: int, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(*arguments) == code
    assert says in capsys.readouterr().err
