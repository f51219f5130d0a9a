"""The records that reports are drawn from: what was compared or inspected, on what data, on which machine, and what
came out.

Records are plain, validated data: they hold no tensors and run nothing, so a table or a page can be made again from a
stored file years later. JSON is strict: non-finite numbers are the strings "Infinity", "-Infinity" and "NaN". Fields
that this version does not know are refused, with their name.
"""

from __future__ import annotations

import math
import re
from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

Width = Annotated[float, Field(ge=0, le=1024, allow_inf_nan=False)]  # bits
Seconds = Annotated[float, Field(ge=0, le=1e12, allow_inf_nan=False)]
Bytes = Annotated[int, Field(ge=0, le=2**63)]


class Record(BaseModel):
    """A frozen, validated piece of a report."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")


class Corpus(Record):
    """Text that a model was calibrated or judged on: ``windows`` pieces (None: all) of ``length`` tokens."""

    text: str
    windows: int | None = None
    length: int | None = None

    def describe(self) -> str:
        """``"wiki.test.tokens, 16 windows of 2048 tokens"``."""
        if self.length is None:
            return self.text
        count = "all windows" if self.windows is None else f"{self.windows} window{'' if self.windows == 1 else 's'}"
        return f"{self.text}, {count} of {self.length} tokens"


class Machine(Record):
    """Where it ran. ``versions`` maps a package to its version."""

    cpu: str
    threads: int = Field(ge=1)
    versions: dict[str, str] = Field(default_factory=dict)


class LayerRow(Record):
    """One layer under one method. Its fields are those of the engine's own report of a layer.

    ``output_error`` is ``||(W - Q) X||^2 / ||W X||^2`` and ``weight_error`` ``||W - Q||^2 / ||W||^2``; ``block`` is
    None for a layer outside of the repeated blocks (the engine's -1 is read as None); ``tokens`` were seen by its
    statistics; ``fallback`` says what was done instead of what was asked; ``inputs`` how its input is rounded at run
    time; ``facts`` whatever else its rounding tells.
    """

    name: str
    block: int | None = None
    shape: tuple[int, ...] = ()
    scheme: str = ""
    bits: float | None = None
    weight_error: float | None = None
    output_error: float | None = None
    loss: float | None = None
    damp: float | None = None
    tokens: int = 0
    fallback: str | None = None
    inputs: str | None = None
    facts: dict[str, Any] = Field(default_factory=dict)

    @field_validator("block")
    @classmethod
    def _outside(cls, block: int | None) -> int | None:
        return None if block is None or block < 0 else block

    @property
    def error(self) -> float | None:
        """The relative output error, or that of the weights where no inputs were seen."""
        return self.weight_error if self.output_error is None else self.output_error


class Row(Record):
    """One method at one width. ``bits`` is the nominal width of a code, ``bits_per_weight`` counts every stored byte;
    ``group`` None means one scale a row. ``excess_percent`` over float is filled in by the record that holds the row.
    Costs are of this row alone; None where they were not measured."""

    method: str
    bits: Width
    group: int | None = None
    scheme: str = ""
    bits_per_weight: Width | None = None
    perplexity: float | None = None
    excess_percent: float | None = None
    seconds: Seconds | None = None
    cpu_seconds: Seconds | None = None
    peak_memory_bytes: Bytes | None = None
    checkpoint_bytes: Bytes | None = None
    notes: tuple[str, ...] = ()
    layers: tuple[LayerRow, ...] = ()
    status: Literal["ok", "failed"] = "ok"
    reason: str | None = None

    @property
    def title(self) -> str:
        """``"awq+gptq, 4 bits, group 64"``."""
        return f"{self.method}, {self.bits:g} bit{'' if self.bits == 1 else 's'}, {group_name(self.group)}"

    @property
    def measured(self) -> bool:
        """Whether there is a finite, possible perplexity at a known number of bits."""
        return (
            self.status == "ok"
            and self.perplexity is not None
            and math.isfinite(self.perplexity)
            and self.perplexity > 0
            and self.bits_per_weight is not None
            and math.isfinite(self.bits_per_weight)
        )


def group_name(group: int | None) -> str:
    """``"group 64"`` or ``"one scale a row"``."""
    return "one scale a row" if group is None else f"group {group}"


def excess_percent(perplexity: float | None, reference: float) -> float | None:
    """``100 (perplexity / reference - 1)``; None where either is unknown or not finite."""
    if perplexity is None or not math.isfinite(perplexity) or not math.isfinite(reference) or reference <= 0:
        return None
    return 100.0 * (perplexity / reference - 1.0)


class CompareRecord(Record):
    """Methods side by side: one model, one calibration, one evaluation."""

    kind: Literal["compare"] = "compare"
    model: str
    calibration: Corpus
    evaluation: Corpus
    float_perplexity: float
    float_bits_per_weight: Width
    machine: Machine
    seed: int
    date: datetime
    notes: tuple[str, ...] = ()
    rows: tuple[Row, ...] = ()

    @field_validator("rows")
    @classmethod
    def _excess(cls, rows: tuple[Row, ...], info: ValidationInfo) -> tuple[Row, ...]:
        # one truth: the excess always follows from the two perplexities
        reference = info.data.get("float_perplexity", math.nan)
        return tuple(
            row.model_copy(update={"excess_percent": excess_percent(row.perplexity, reference)}) for row in rows
        )

    def short_name(self, row: Row) -> str:
        """The method, with the group where rows differ in it: ``"awq g64"``."""
        if len({r.group for r in self.rows}) < 2:
            return row.method
        return f"{row.method} " + ("row" if row.group is None else f"g{row.group}")

    def short_title(self, row: Row) -> str:
        """The same with the width: ``"awq g64 4-bit"``."""
        return f"{self.short_name(row)} {row.bits:g}-bit"


class InspectLayer(Record):
    """One layer of a float model, before anything is rounded.

    ``input_max_over_median``: the largest input channel's max |x| over the median channel's. Kurtosis is the fourth
    standardised moment (3 for a Gaussian). ``rtn_error`` maps a width in bits to the relative output error of
    round-to-nearest at that width.
    """

    name: str
    block: int | None = None
    shape: tuple[int, ...] = ()
    sites: tuple[str, ...] = ()
    input_max_over_median: float | None = None
    input_kurtosis: float | None = None
    input_absmax: float | None = None
    weight_kurtosis: float | None = None
    weight_absmax: float | None = None
    rtn_error: dict[int, float] = Field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @field_validator("block")
    @classmethod
    def _outside(cls, block: int | None) -> int | None:
        return None if block is None or block < 0 else block


class InspectRecord(Record):
    """What a model looks like to a quantizer. ``scheme`` names the grid behind ``rtn_error``."""

    kind: Literal["inspect"] = "inspect"
    model: str
    calibration: Corpus
    machine: Machine
    seed: int
    date: datetime
    scheme: str = ""
    notes: tuple[str, ...] = ()
    layers: tuple[InspectLayer, ...] = ()

    @property
    def widths(self) -> list[int]:
        """The widths that any layer has an error for, widest first."""
        return sorted({bits for layer in self.layers for bits in layer.rtn_error}, reverse=True)


def role(name: str, block: int | None) -> str:
    """What a layer is called inside its block: ``role("model.layers.3.mlp.up_proj", 3) == "mlp.up_proj"``.

    The index of the block is looked for in the name, never the name of an architecture.
    """
    if block is None:
        return name
    found = re.search(rf"(?:^|\.){block}\.(.+)$", name)
    return found.group(1) if found else name
