"""What a few-bit model does at run time besides its layers: rotations of inputs, and few-bit keys and values. One record in ``config.json``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from dither.errors import CheckpointError
from dither.formats import Scheme
from dither.quant.attention_inputs import Attention, checked, use_operands
from dither.quant.online import turn

AROUND = "around"


@dataclass(frozen=True)
class Surroundings:
    """``turns``: layer -> order of the Hadamard matrix on its input; ``kv``: how keys and values are rounded; ``rotate_heads``: queries and
    keys are rotated by a Hadamard matrix first; ``attention``: attention modules -> how their operands are rounded."""

    turns: dict[str, int] = field(default_factory=dict)
    kv: Scheme | None = None
    rotate_heads: bool = False
    attention: Attention = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """``{"around": {...}}``, or nothing where nothing happens."""
        found: dict[str, Any] = {}
        if self.turns:
            found["turns"] = dict(self.turns)
        if self.kv is not None:
            found["kv"] = self.kv.to_json()
            found["rotate_heads"] = self.rotate_heads
        if self.attention:
            found["attention"] = self.attention
        return {AROUND: found} if found else {}

    def does(self) -> list[str]:
        """What happens, in words."""
        found = [f"inputs of {len(self.turns)} layers are rotated"] if self.turns else []
        if self.kv is not None:
            found.append(f"keys and values are rounded to {self.kv}" + (", heads rotated" if self.rotate_heads else ""))
        return found + ([f"operands of {len(self.attention)} attentions are rounded"] if self.attention else [])

    @classmethod
    def from_json(cls, config: Mapping[str, Any]) -> Surroundings:
        """From a ``quantization_config``. Raises CheckpointError where the record makes no sense."""
        try:
            data = config.get(AROUND) or {}
            turns = {str(name): order for name, order in data.get("turns", {}).items()}
            if not all(type(order) is int and order > 0 for order in turns.values()):
                raise ValueError(f"turns: orders must be counts, not {list(turns.values())[:3]}")
            kv = None if data.get("kv") is None else Scheme.from_json(data["kv"])
            if kv is not None and (not kv.dynamic or kv.blocks.height != 1 or kv.tensor_scale):
                raise ValueError(f"kv: {kv} must be dynamic, in blocks of one row")
            return cls(turns, kv, bool(data.get("rotate_heads", False)), checked(data.get("attention", {})))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"config.json: quantization_config is damaged ({error}); get the checkpoint again") from None


def put_turns(model: nn.Module, turns: Mapping[str, int]) -> None:
    """Wrap the layers whose input is rotated. Raises CheckpointError where the model has no such layer."""
    for name, order in turns.items():
        try:
            turn(model, name, order)
        except AttributeError:
            raise CheckpointError(f"{name}: is in the checkpoint, but not in the model") from None


def surround(model: nn.Module, config: Mapping[str, Any]) -> None:
    """Make attention round what it multiplies, as a ``quantization_config`` says."""
    around = Surroundings.from_json(config)
    if around.kv is not None:
        from dither.quant.kv import few_bit_attention

        few_bit_attention(model, around.kv, rotate=around.rotate_heads)
    if around.attention:
        use_operands(model)


def check_attention(model: nn.Module) -> None:
    """Raises ModelError where the keys and values of ``model`` (or of one block) could not be rounded."""
    from dither.quant.kv import attention_modules

    attention_modules(model)
