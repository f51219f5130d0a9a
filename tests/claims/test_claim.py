"""Records, verdicts and where they are kept; nothing here runs a language model."""

from __future__ import annotations

import json
import math
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from dither import claims
from dither.claims import claim as machinery
from dither.claims.claim import Claim, Test, verdict
from dither.errors import CheckpointError, DitherError, UsageError

FIELDS = {
    "claim": str,
    "sentence": str,
    "source": str,
    "work": str,
    "data": str,
    "paper": dict,
    "figures": dict,
    "tests": list,
    "verdict": str,
    "caveat": str,
    "seeds": list,
    "seconds": float,
    "machine": dict,
    "date": str,
}


def made(bars: tuple[float, ...] = (2.0,), **changes: Any) -> Claim:
    """A claim whose figure is the seed plus one; its tests want the mean below each bar."""
    values: dict[str, Any] = {
        "name": "made",
        "sentence": "one is less than two",
        "source": "a paper",
        "work": "none",
        "measure": lambda seed, say: {"figure": seed + 1.0},
        "tests": tuple(Test(f"below {bar}", lambda f, bar=bar: f["figure"] < bar) for bar in bars),
        "data": lambda: "numbers",
        "paper": {"figure": 1.5},
    }
    return Claim(**(values | changes))


def check_schema(record: dict[str, Any]) -> None:
    assert {name: type(value) for name, value in record.items()} == FIELDS
    for figure in record["figures"].values():
        assert figure.keys() == {"mean", "spread", "values"} and len(figure["values"]) == len(record["seeds"])
    assert all(test.keys() == {"says", "holds"} for test in record["tests"]) and record["tests"]
    assert record["verdict"] == verdict(test["holds"] for test in record["tests"])
    assert record["machine"].keys() == {"cpu", "threads", "versions"}
    assert {"dither", "python", "torch", "transformers"} <= record["machine"]["versions"].keys()
    assert datetime.fromisoformat(record["date"]).tzinfo is not None


def run(claim: Claim, **given: Any) -> dict[str, Any]:
    return claims.run(claim, say=lambda line: None, **given)


def test_a_record_holds_all_that_was_measured() -> None:
    record = run(made())
    check_schema(record)
    assert record["figures"]["figure"] == {"mean": 2.0, "spread": 1.0, "values": [1.0, 2.0, 3.0]}
    assert record["seeds"] == [0, 1, 2] and record["data"] == "numbers" and record["verdict"] == "fails"


def test_seeds_can_be_chosen() -> None:
    record = run(made(), seeds=[0])
    assert record["figures"]["figure"]["spread"] is None and record["verdict"] == "holds"
    assert run(made(), seeds=[3, 3])["seeds"] == [3]
    with pytest.raises(ValueError, match="seeds"):
        run(made(), seeds=[])


@pytest.mark.parametrize(
    "bars, expected", [((2.1,), "holds"), ((1.0, 3.0), "holds in part"), ((1.0, 0.5), "fails"), ((2.1, 9.0), "holds")]
)
def test_the_verdict_is_that_of_the_tests_on_the_means(bars: tuple[float, ...], expected: str) -> None:
    assert run(made(bars))["verdict"] == expected


def test_nothing_passes_a_test_by_being_unmeasurable(tmp_path: Path) -> None:
    record = run(made((2.0,), measure=lambda seed, say: {"figure": math.nan if seed else math.inf}))
    assert record["verdict"] == "fails" and record["figures"]["figure"]["spread"] is None
    text = claims.save(record, tmp_path).read_text()
    assert json.loads(text, parse_constant=pytest.fail)["figures"]["figure"]["values"] == ["Infinity", "NaN", "NaN"]


def test_a_claim_without_tests_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one test"):
        made(())


def test_seeds_must_measure_the_same() -> None:
    with pytest.raises(ValueError, match="different figures"):
        run(made(measure=lambda seed, say: {f"figure {seed}": 1.0}))


def test_records_are_written_whole_and_read_back(tmp_path: Path) -> None:
    record = run(made())
    assert claims.stored("made", tmp_path) is None
    path = claims.save(record, tmp_path / "deep" / "folder")
    assert claims.stored("made", tmp_path / "deep" / "folder") == record
    assert [file.name for file in path.parent.iterdir()] == ["made.json"]


def test_a_stopped_run_goes_on_behind_the_last_seed(tmp_path: Path) -> None:
    seen: list[int] = []

    def measure(seed: int, say: Any) -> dict[str, float]:
        seen.append(seed)
        if seed == 1 and len(seen) == 2:
            raise KeyboardInterrupt
        return {"figure": seed + 1.0}

    claim = made(measure=measure)
    with pytest.raises(KeyboardInterrupt):
        run(claim, folder=tmp_path)
    record = run(claim, folder=tmp_path)
    assert seen == [0, 1, 1, 2] and record["figures"] == run(made())["figures"]
    claims.save(record, tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["made.json"]
    run(claim, folder=tmp_path)  # after a record: anew
    assert seen == [0, 1, 1, 2, 0, 1, 2]


def test_seeds_of_another_claim_and_damaged_ones_are_measured_again(tmp_path: Path) -> None:
    run(made(), folder=tmp_path)
    seen: list[int] = []

    def measure(seed: int, say: Any) -> dict[str, float]:
        seen.append(seed)
        return {"figure": seed + 1.0}

    run(made(measure=measure, work="other"), folder=tmp_path)
    assert seen == [0, 1, 2]
    (tmp_path / "made.seeds.json").write_text("{")
    run(made(measure=measure, work="other"), folder=tmp_path)
    assert seen == [0, 1, 2, 0, 1, 2]


def test_a_package_that_cannot_be_written_leaves_records_to_the_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "package" / "records"
    monkeypatch.setattr(machinery, "RECORDS", package)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    assert claims.save(run(made())) == package / "made.json"
    monkeypatch.setattr(machinery, "_writable", lambda folder: False)
    later = run(made()) | {"date": "2999-01-01T00:00:00+00:00"}
    assert claims.save(later) == tmp_path / "data" / "dither" / "claims" / "made.json"
    assert claims.stored("made") == later  # the latest of the two


def test_a_folder_is_writable_if_it_could_be_made(tmp_path: Path) -> None:
    assert machinery._writable(tmp_path / "not" / "there")


def test_a_place_that_takes_no_record_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DitherError, match=r"made\.json"):
        claims.save(run(made()), tmp_path / "file")


@pytest.mark.parametrize("text", ["{", "[]", '{"claim": "made"}', "\udcff"])
def test_damaged_records_are_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "made.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(CheckpointError, match=r"made\.json: is damaged"):
        claims.stored("made", tmp_path)


def test_unknown_claims_suggest_the_nearest() -> None:
    with pytest.raises(UsageError, match="did you mean 'gptq'") as caught:
        claims.find("GPTP", claims.CLAIMS)
    assert caught.value.exit_code == 2
    with pytest.raises(UsageError, match="The claims are awq, gptq"):
        claims.find("", claims.CLAIMS)
    assert claims.find("awq", claims.CLAIMS) is claims.CLAIMS["awq"]


@pytest.mark.parametrize("name", sorted(claims.CLAIMS))
def test_stored_records_are_records(name: str) -> None:
    record = claims.stored(name, machinery.RECORDS)
    if record is None:
        pytest.skip(f"claim {name} was not measured yet")
    check_schema(record)
    assert [test["says"] for test in record["tests"]] == [test.says for test in claims.CLAIMS[name].tests]
