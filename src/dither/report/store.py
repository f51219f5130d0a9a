"""Records to and from disk. Every file appears whole or not at all: it is written beside its place and moved
there."""

from __future__ import annotations

import csv
import io
import os
from pathlib import Path
from typing import Annotated

from pydantic import Field, TypeAdapter, ValidationError

from dither.errors import DitherError
from dither.report.records import CompareRecord, InspectRecord, Row

AnyRecord = CompareRecord | InspectRecord
_ADAPTER: TypeAdapter[AnyRecord] = TypeAdapter(Annotated[AnyRecord, Field(discriminator="kind")])

_COMPARE_COLUMNS = (
    "method",
    "bits",
    "group",
    "scheme",
    "bits_per_weight",
    "perplexity",
    "excess_percent",
    "seconds",
    "cpu_seconds",
    "peak_memory_bytes",
    "checkpoint_bytes",
    "status",
    "reason",
    "notes",
)
_INSPECT_COLUMNS = (
    "name",
    "block",
    "shape",
    "sites",
    "input_max_over_median",
    "input_kurtosis",
    "input_absmax",
    "weight_kurtosis",
    "weight_absmax",
)


def write_text(path: str | Path, text: str) -> Path:
    """Write ``text`` (UTF-8) to ``path`` atomically; folders are made. Raises DitherError where the place cannot be
    written."""
    path = Path(path)
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(beside, "w", encoding="utf-8", newline="") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(beside, path)
        except BaseException:
            beside.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise DitherError(
            f"{path}: cannot be written ({error.strerror or error}); make room or choose another place"
        ) from None
    return path


def to_json(record: AnyRecord, path: str | Path) -> Path:
    """Store a record as strict JSON, indented so that versions of it can be compared."""
    return write_text(path, record.model_dump_json(indent=1) + "\n")


def read_json(path: str | Path) -> AnyRecord:
    """The record in a file. Raises DitherError, naming the field, where the file is missing, damaged or not a
    record."""
    path = Path(path)
    try:
        return _ADAPTER.validate_json(path.read_bytes())
    except OSError as error:
        raise DitherError(
            f"{path}: cannot be read ({error.strerror or error}); give the JSON file that a run wrote"
        ) from None
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise DitherError(
            f"{path}: is not a record of dither ({where}: {first['msg']}); run the command that wrote it again"
        ) from None


def to_csv(record: AnyRecord, path: str | Path) -> Path:
    """A record's main table as CSV: raw numbers, empty where unknown. A comparison starts with the float model's
    row."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    if isinstance(record, CompareRecord):
        writer.writerow(_COMPARE_COLUMNS)
        reference = Row(
            method="float",
            bits=record.float_bits_per_weight,
            bits_per_weight=record.float_bits_per_weight,
            perplexity=record.float_perplexity,
            excess_percent=0.0,
        )
        for row in (reference, *record.rows):
            writer.writerow([_cell(getattr(row, column)) for column in _COMPARE_COLUMNS])
    else:
        widths = record.widths
        writer.writerow([*_INSPECT_COLUMNS, *(f"rtn_error_{bits}_bits" for bits in widths), "notes"])
        for layer in record.layers:
            cells = [getattr(layer, column) for column in _INSPECT_COLUMNS]
            cells += [layer.rtn_error.get(bits) for bits in widths]
            writer.writerow([_cell(cell) for cell in (*cells, layer.notes)])
    return write_text(path, out.getvalue())


def _cell(value: object) -> str:
    """A number so that it reads back the same; lists joined ("576x576" for shapes, "; " for text)."""
    if value is None:
        return ""
    if isinstance(value, tuple):
        return ("x" if value and isinstance(value[0], int) else "; ").join(str(item) for item in value)
    return repr(value) if isinstance(value, float) else str(value)
