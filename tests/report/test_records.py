"""Records survive JSON and CSV, whole files or none, and say what is wrong with a damaged one."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from dither.errors import DitherError
from dither.report import CompareRecord, InspectRecord, LayerRow, Row, read_json, to_csv, to_json
from dither.report.records import role

numbers = st.none() | st.floats(allow_nan=False)
text = st.text(max_size=20)
layer_rows = st.builds(
    LayerRow,
    name=text,
    block=st.none() | st.integers(0, 90),
    scheme=text,
    output_error=numbers,
    weight_error=numbers,
    damp=numbers,
    fallback=st.none() | text,
    shape=st.lists(st.integers(1, 9), max_size=3).map(tuple),
)
rows = st.builds(
    Row,
    method=text,
    bits=st.floats(1, 8),
    group=st.none() | st.integers(1, 1024),
    scheme=text,
    bits_per_weight=st.none() | st.floats(0, 1024),
    perplexity=numbers,
    seconds=st.none() | st.floats(0, 1e12),
    peak_memory_bytes=st.none() | st.integers(0, 2**50),
    notes=st.lists(text, max_size=2).map(tuple),
    layers=st.lists(layer_rows, max_size=2).map(tuple),
    status=st.sampled_from(["ok", "failed"]),
    reason=st.none() | text,
)


def test_json_round_trip(records: dict[str, CompareRecord], inspection: InspectRecord, tmp_path: Path) -> None:
    for name, record in (records | {"inspection": inspection}).items():
        path = to_json(record, tmp_path / "new folder" / f"{name}.json")

        def refuse(constant: str, name: str = name) -> None:
            pytest.fail(f"{name}: {constant} is not strict JSON")

        json.loads(path.read_text(), parse_constant=refuse)
        # text, because a NaN perplexity is unequal to itself
        assert read_json(path).model_dump_json() == record.model_dump_json(), name
    assert {p.suffix for p in (tmp_path / "new folder").iterdir()} == {".json"}  # no temporary file stays


@given(st.lists(rows, max_size=3), st.floats(1, 1e6))
def test_json_round_trip_of_any_rows(found: list[Row], reference: float) -> None:
    base = {
        "model": "m",
        "calibration": {"text": "c"},
        "evaluation": {"text": "e"},
        "machine": {"cpu": "x", "threads": 1},
        "seed": 0,
    }
    record = CompareRecord.model_validate(
        base
        | {"float_perplexity": reference, "float_bits_per_weight": 16, "date": "2026-11-24T12:00:00Z", "rows": found}
    )
    assert CompareRecord.model_validate_json(record.model_dump_json()) == record


def test_excess_follows_from_the_perplexities(records: dict[str, CompareRecord]) -> None:
    forged = records["typical"].model_dump() | {
        "rows": [{"method": "a", "bits": 4, "perplexity": 36.6, "excess_percent": 0.0}]
    }
    record = CompareRecord.model_validate(forged)
    assert record.rows[0].excess_percent == pytest.approx(100.0)
    assert all(row.excess_percent is None for row in records["hopeless"].rows if row.perplexity in (None, math.inf))


@pytest.mark.parametrize(
    ("field", "value"),
    [("bits", math.nan), ("bits_per_weight", -1), ("seconds", math.inf), ("peak_memory_bytes", -5), ("status", "fine")],
)
def test_impossible_figures_are_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(ValidationError, match=field):
        Row.model_validate({"method": "rtn", "bits": 4, field: value})


def test_csv_round_trip(records: dict[str, CompareRecord], tmp_path: Path) -> None:
    for name, record in records.items():
        with open(to_csv(record, tmp_path / f"{name}.csv"), newline="", encoding="utf-8") as file:
            table = list(csv.DictReader(file))
        assert len(table) == len(record.rows) + 1
        assert float(table[0]["perplexity"]) == record.float_perplexity
        for line, row in zip(table[1:], record.rows, strict=True):
            assert (
                line["method"] == row.method and line["status"] == row.status and line["reason"] == (row.reason or "")
            )
            for column in (
                "bits",
                "group",
                "bits_per_weight",
                "perplexity",
                "excess_percent",
                "seconds",
                "cpu_seconds",
                "peak_memory_bytes",
                "checkpoint_bytes",
            ):
                value = getattr(row, column)
                if value is None:
                    assert line[column] == ""
                else:
                    assert repr(float(line[column])) == repr(float(value)), (name, column)


def test_csv_of_an_inspection(inspection: InspectRecord, tmp_path: Path) -> None:
    with open(to_csv(inspection, tmp_path / "i.csv"), newline="", encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    assert [line["name"] for line in table] == [layer.name for layer in inspection.layers]
    for line, layer in zip(table, inspection.layers, strict=True):
        assert line["shape"] == "x".join(map(str, layer.shape))
        for bits in (4, 3, 2):
            cell = line[f"rtn_error_{bits}_bits"]
            assert (float(cell) if cell else None) == layer.rtn_error.get(bits)


def test_a_layer_takes_the_engines_own_report() -> None:
    @dataclass
    class LayerReport:  # the fields of dither.quant.outcome.LayerReport, which needs torch
        name: str = "lm_head"
        block: int = -1
        shape: tuple[int, ...] = (8, 4)
        scheme: str = "int4"
        bits: float = 4.5
        weight_error: float = 0.25
        output_error: float | None = None
        loss: float | None = None
        damp: float | None = None
        tokens: int = 0
        fallback: str | None = None
        extra: dict[str, Any] = field(default_factory=dict)

    given = asdict(LayerReport())
    del given["extra"]
    layer = LayerRow(**given)
    assert layer.block is None and layer.error == 0.25
    with pytest.raises(ValidationError, match="extra"):
        LayerRow(**asdict(LayerReport()))


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda text: text[: len(text) // 2], "the file"),
        (lambda text: text.replace('"seed": 0', '"seed": "zero"'), "seed"),
        (lambda text: text.replace('"seed": 0', '"seeds": 0'), "seed"),
        (lambda text: text.replace('"kind": "compare"', '"kind": "other"'), "kind"),
        (lambda text: "[1, 2]", "is not a record"),
        (lambda text: "\x00\xff", "is not a record"),
    ],
)
def test_a_damaged_record_is_named(damage: Any, told: str, records: dict[str, CompareRecord], tmp_path: Path) -> None:
    path = to_json(records["one"], tmp_path / "r.json")
    path.write_text(damage(path.read_text()))
    with pytest.raises(DitherError) as caught:
        read_json(path)
    assert str(path) in str(caught.value) and told in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_record_is_named(tmp_path: Path) -> None:
    with pytest.raises(DitherError, match="cannot be read"):
        read_json(tmp_path / "none.json")


def test_a_failed_write_leaves_the_old_file(
    records: dict[str, CompareRecord], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = to_json(records["one"], tmp_path / "r.json")
    before = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(DitherError, match="No space left"):
        to_json(records["typical"], path)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["r.json"]


def test_a_file_in_the_place_of_a_folder(records: dict[str, CompareRecord], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DitherError, match="cannot be written"):
        to_json(records["one"], tmp_path / "file" / "r.json")


def test_roles() -> None:
    assert role("model.layers.3.mlp.up_proj", 3) == "mlp.up_proj"
    assert role("h.11.attn.c_attn", 11) == "attn.c_attn"
    assert role("encoder.1.layers.13.fc1", 13) == "fc1"
    assert role("1.layers.1.fc", 1) == "layers.1.fc"
    assert role("lm_head", None) == "lm_head"
    assert role("blocks_7.fc", 7) == "blocks_7.fc"
