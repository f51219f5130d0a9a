"""A unit of a checkpoint: one finished block (or what lies outside of all blocks), as tensors and facts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor

from dither.formats import QTensor
from dither.quant import attention_inputs
from dither.quant.inputs import InputQuant
from dither.quant.outcome import LayerReport

ADDED_BIAS = "added_bias"
INPUTS = "inputs"  # the child module of a few-bit layer that holds how its input is rounded


@dataclass
class Unit:
    """``tensors`` are exactly what is stored, under full names. ``replaced`` maps the name of each parameter that became a `QTensor` to
    how: kind (linear, embedding, parameter), scheme, shape, and the prefix of its stored tensors; ``attention`` maps attention modules to how
    their operands are rounded."""

    name: str
    tensors: dict[str, Tensor] = field(default_factory=dict)
    replaced: dict[str, dict[str, Any]] = field(default_factory=dict)
    layers: list[LayerReport] = field(default_factory=list)
    sites: list[dict[str, Any]] = field(default_factory=list)
    proved: list[dict[str, Any]] = field(default_factory=list)
    unproved: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    attention: attention_inputs.Attention = field(default_factory=dict)

    def add(
        self,
        parameter: str,
        kind: str,
        tensor: QTensor,
        row: LayerReport,
        *,
        storage: Sequence[int] = (),
        swapped: bool = False,
        inputs: InputQuant | None = None,
        added_bias: bool = False,
    ) -> None:
        """Record the rounded ``parameter`` (full name). Linear layers and embeddings hold the stored tensors themselves; any other
        module holds them in a child named after the parameter, and reads them through it (``kind`` "parameter").

        ``storage``: the parameter's own shape, where it is not ``[O, I]``; ``swapped``: it stores ``[..., I, O]``; ``inputs``: how the layer's
        input is rounded at run time; ``added_bias``: the layer has a bias that the float model's has not.
        """
        prefix = f"{parameter}_quantized" if kind == "parameter" else parameter.rpartition(".")[0]
        for key, value in tensor.tensors().items():
            self.tensors[f"{prefix}.{key}"] = value
        extra = {} if inputs is None else inputs.tensors()
        for key, value in extra.items():
            self.tensors[f"{prefix}.{INPUTS}.{key}"] = value
        row.bits = tensor.bits
        row.inputs = None if inputs is None else str(inputs.scheme)
        self.layers.append(row)
        self.replaced[parameter] = {
            "kind": kind,
            "scheme": tensor.scheme.to_json(),
            "shape": list(tensor.shape),
            "prefix": prefix,
            "storage": list(storage or tensor.shape),
            "swapped": swapped,
            "bytes": tensor.nbytes + sum(t.numel() * t.element_size() for t in extra.values()),
        }
        if inputs is not None:
            self.replaced[parameter]["inputs"] = inputs.to_json()
        if added_bias:
            self.replaced[parameter][ADDED_BIAS] = True

    def attend(self, name: str, operands: Mapping[str, InputQuant]) -> None:
        """Record how the attention module ``name`` rounds its operands."""
        self.attention[name] = {operand: quant.to_json() for operand, quant in operands.items()}
        self.tensors |= attention_inputs.tensors(name, operands)

    def keep(self, name: str, tensor: Tensor) -> None:
        self.tensors[name] = tensor
        if tensor.dim() > 1 and name.endswith("weight"):
            self.kept.append(name.removesuffix(".weight"))

    def facts(self) -> dict[str, Any]:
        return {k: v for k, v in asdict(self).items() if k != "tensors"}

    @classmethod
    def from_facts(cls, facts: dict[str, Any], tensors: dict[str, Tensor]) -> Unit:
        layers = [LayerReport(**{**row, "shape": tuple(row["shape"])}) for row in facts["layers"]]
        return cls(**{**facts, "layers": layers, "tensors": tensors})

    def without_tensors(self) -> Unit:
        return Unit.from_facts(self.facts(), {})

    @property
    def stored_bits(self) -> int:
        return 8 * sum(int(entry["bytes"]) for entry in self.replaced.values())

    @property
    def weights(self) -> int:
        total = 0
        for entry in self.replaced.values():
            count = 1
            for size in entry["shape"]:
                count *= size
            total += count
        return total

    @property
    def mean_error(self) -> float | None:
        return sum(row.weight_error for row in self.layers) / len(self.layers) if self.layers else None
