"""What an export is made of: a checkpoint as it is read, its few-bit weights, and a `Target`, one a format.

A target says which weights it can hold exactly, and why not the others; which scheme of ours it would store the others in; and writes a
checkpoint whose weights all fit. Refusals, the measured cost of a re-encoding, and the list of formats that would do are made of that, once
for all targets, in `dither.quant.export`.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dither.errors import CheckpointError
from dither.formats import Int, QTensor, Scheme, WeightScheme, group, scheme_from_json
from dither.models import skeleton
from dither.quant.checkpoint import APART, read_config, replaced_of
from dither.quant.outcome import REPORT
from dither.quant.store import INDEX, read_tensors, write_text
from dither.quant.surroundings import Surroundings
from dither.quant.unit import ADDED_BIAS, INPUTS

PLAIN = ("float16", "bfloat16", "float32")  # scales that are numbers by themselves


@dataclass(frozen=True)
class Weight:
    """One few-bit weight: a matrix ``shape`` (O, I) on ``scheme``. ``kind``: linear, embedding or parameter; ``storage``: the shape of the
    parameter; ``swapped``: the parameter is stored as ``[..., I, O]``; ``rounds``: the layer's input is rounded at run time."""

    name: str
    kind: str
    scheme: WeightScheme
    shape: tuple[int, int]
    storage: tuple[int, ...]
    prefix: str
    swapped: bool = False
    rounds: bool = False
    added_bias: bool = False

    @classmethod
    def of(cls, name: str, entry: Mapping[str, Any]) -> Weight:
        """From the record of a parameter in ``config.json``."""
        return cls(
            name,
            entry["kind"],
            scheme_from_json(entry["scheme"]),
            (entry["shape"][0], entry["shape"][1]),
            tuple(entry["storage"]),
            entry["prefix"],
            entry["swapped"],
            entry.get(INPUTS) is not None,
            bool(entry.get(ADDED_BIAS, False)),
        )

    @property
    def layer(self) -> str:
        """The name of its module."""
        return self.name.removesuffix(".weight")


@dataclass
class Opened:
    """A finished checkpoint. ``weights``: as stored; ``tokenizer``: a GGUF file whose tokenizer goes in the place of the checkpoint's own, where the
    format carries one; ``changed``: weights that are to be written otherwise than they are stored.

    Memory: all stored tensors at once.
    """

    folder: Path
    config: dict[str, Any]
    weights: list[Weight]
    tokenizer: Path | None = None
    changed: dict[str, QTensor] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path, tokenizer: Path | None = None) -> Opened:
        """Raises CheckpointError where ``config.json`` is damaged. Tensors are read when first asked for."""
        config = read_config(folder)
        return cls(folder, config, [Weight.of(*item) for item in replaced_of(config["quantization_config"]).items()], tokenizer)

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        return read_tensors(self.folder)

    @property
    def at_run_time(self) -> list[str]:
        """What the model does beside its layers, in words: no other program does it."""
        return Surroundings.from_json(self.config["quantization_config"]).does()

    def plain_config(self) -> dict[str, Any]:
        """The config of the float model. A head that was stored apart from its embedding is no longer tied to it."""
        config = {k: v for k, v in self.config.items() if k != "quantization_config"}
        return config | ({"tie_word_embeddings": False} if self.config["quantization_config"].get(APART) else {})

    def to_write(self) -> list[Weight]:
        """The weights on the schemes that they are to be written in."""
        return [replace(w, scheme=self.changed[w.name].scheme) if w.name in self.changed else w for w in self.weights]

    def qtensor(self, weight: Weight) -> QTensor:
        """The weight as it is to be written. Raises CheckpointError where what is stored is no such tensor."""
        return self.changed[weight.name] if weight.name in self.changed else self.as_stored(weight)

    def as_stored(self, weight: Weight) -> QTensor:
        """One of ``weights``. Raises CheckpointError where what is stored is no such tensor."""
        keys = _keys(weight)
        own = {key: self.tensors[name] for key in keys if (name := f"{weight.prefix}.{key}") in self.tensors}
        try:
            return QTensor.from_tensors(own, weight.scheme, weight.shape)
        except CheckpointError as error:
            raise CheckpointError(f"{self.folder}: {weight.prefix}.{error}; quantize again") from None

    def floats(self) -> dict[str, Tensor]:
        """What is not few-bit, by its name in the float model."""
        few = {f"{weight.prefix}.{key}" for weight in self.weights for key in _keys(weight)}
        return {name: tensor for name, tensor in self.tensors.items() if name not in few}

    def skeleton(self) -> nn.Module:
        """The float model without weights."""
        config = skeleton.read_config(self.folder)
        config.quantization_config = None
        if self.plain_config().get("tie_word_embeddings") is False:
            config.tie_word_embeddings = False
        return skeleton.build(config, skeleton.auto_class(config), "sdpa", torch.float32, where=self.folder)

    def float_linears(self) -> list[str]:
        """The Linear layers of the model that stay float."""
        few = {weight.name for weight in self.weights}
        return [name for name, m in self.skeleton().named_modules() if isinstance(m, nn.Linear) and f"{name}.weight" not in few]

    def sidecars(self, out: Path) -> None:
        """Copy the tokenizer and the generation settings: everything small that is not ours."""
        ours = ("config.json", REPORT, INDEX)
        for file in sorted(self.folder.iterdir()):
            if file.is_file() and file.suffix in (".json", ".model", ".txt", ".jinja") and file.name not in ours:
                shutil.copy2(file, out / file.name)


    def write_folder(self, out: Path, tensors: Mapping[str, Tensor], quantization: dict[str, Any]) -> None:
        """A folder that transformers knows how to read: ``tensors`` in safetensors shards, the config with ``quantization`` in it, the tokenizer."""
        from huggingface_hub import save_torch_state_dict

        save_torch_state_dict({k: v.contiguous() for k, v in tensors.items()}, out, metadata={"format": "pt"})
        self.sidecars(out)
        config = self.plain_config() | {"quantization_config": quantization}
        write_text(out / "config.json", json.dumps(config, indent=2, sort_keys=True))


def _keys(weight: Weight) -> list[str]:
    """The names, under its prefix, of the tensors that a weight is stored as."""
    return list(QTensor.empty(weight.scheme, weight.shape, device="meta").tensors())


Misfits = dict[str, str]
"""Name of a weight -> why it does not fit."""


@dataclass(frozen=True)
class Target:
    """A format. ``holds``: in words, what it stores exactly. ``unknown(checkpoint)``: why it has no place for this kind of model; empty where it has.

    ``misfits(weights)``: those that it does not; ``nearest(weights, bits)``: the schemes, exact in this format, in which weights are
    written instead when their values may change, of about ``bits`` bits (weights that no scheme helps are left out);
    ``write(checkpoint, out)``: makes the files, all weights fitting, and returns notes for the user.
    """

    name: str
    holds: str
    misfits: Callable[[Sequence[Weight]], Misfits]
    nearest: Callable[[Sequence[Weight], int], dict[str, Scheme]]
    write: Callable[[Opened, Path], list[str]]
    unknown: Callable[[Opened], str] = lambda checkpoint: ""

    def can_hold(self, checkpoint: Opened) -> bool:
        """Whether it stores all weights of ``checkpoint`` exactly."""
        return not (checkpoint.at_run_time or self.unknown(checkpoint) or self.misfits(checkpoint.weights))


def article(kind: str) -> str:
    return f"{'an' if kind[0] in 'aeiou' else 'a'} {kind}"


def no_layer(weight: Weight) -> str:
    """Why ``weight`` is no matrix that its layer's input is multiplied with as it comes; empty where it is. (How it is stored does not matter.)"""
    if weight.rounds:
        return "its inputs are rounded at run time"
    if weight.kind != "linear":
        return f"{article(weight.kind)}, not a Linear"
    return "its layer has a bias that the float model's has not" if weight.added_bias else ""


def no_linear(weight: Weight) -> str:
    """Why ``weight`` is no plain few-bit weight of a Linear layer; empty where it is."""
    return no_layer(weight) or ("its layer stores the weight transposed, so it is no Linear" if weight.swapped else "")


def no_grid(scheme: WeightScheme) -> str:
    """Why ``scheme`` is no format on blocks within rows; empty where it is."""
    if not isinstance(scheme, Scheme):
        return f"{scheme} is no grid of numbers"
    return "its blocks span rows" if scheme.blocks.height != 1 else ""


def no_integers(scheme: WeightScheme) -> str:
    """Why ``scheme`` is no integers times plain scales, with integer zero points; empty where it is."""
    if why := no_grid(scheme):
        return why
    fmt = scheme.format  # type: ignore[attr-defined]
    if not isinstance(fmt, Int):
        return f"{fmt} is no integer format"
    if fmt.zero == "float" and not fmt.sym:
        return "its offset is a float"
    return "" if fmt.scale in PLAIN else f"its scales are {fmt.scale}"


def group_size(weight: Weight) -> int:
    """Inputs that share a scale: a whole row where the group is larger."""
    assert isinstance(weight.scheme, Scheme)
    return min(weight.scheme.blocks.columns(weight.shape[1]), weight.shape[1])


def ragged(weight: Weight) -> str:
    """Why the groups of a row do not all have one size; empty where they do."""
    inputs, size = weight.shape[1], group_size(weight)
    return f"its last group is ragged: {inputs} inputs in groups of {size}" if inputs % size else ""


def uncommon(weights: Sequence[Weight], alike: Callable[[Weight], object]) -> Misfits:
    """Weights that are not ``alike`` most others, for formats that have one scheme a model."""
    kinds = Counter(alike(weight) for weight in weights)
    common = kinds.most_common(1)[0][0] if kinds else None
    return {weight.name: f"{weight.scheme} is not the scheme of most weights, and there can be one" for weight in weights if alike(weight) != common}


def one_grid(weights: Sequence[Weight], misfits: Callable[[Sequence[Weight]], Misfits], bits: int) -> dict[str, Scheme]:
    """Re-encodings for a format that has one scheme a model: of what does not fit, on the scheme of most weights; where that does not
    do, of all weights on integers of ``bits`` bits with zero points, in the largest groups of 128 to 16 that cut every row evenly."""
    wrong = misfits(weights)
    right = Counter(weight.scheme for weight in weights if weight.name not in wrong).most_common(1)
    plans = [{name: scheme for name in wrong} for scheme, _ in right if isinstance(scheme, Scheme)]
    sizes = [divisor(weight.shape[1], (128, 64, 32, 16)) or 0 for weight in weights]
    if wrong and min(sizes) > 0:
        plans.append({weight.name: Int(bits) @ group(min(sizes)) for weight in weights})
    for plan in plans:
        if not misfits([replace(w, scheme=plan.get(w.name, w.scheme)) for w in weights]):
            return plan
    return {}


def no_float16_groups(weight: Weight) -> str:
    """Why ``weight`` is no Linear on integers with float16 scales, in groups of one size; empty where it is."""
    if why := no_linear(weight) or no_integers(weight.scheme) or ragged(weight):
        return why
    scale = integers(weight).scale
    return "" if scale == "float16" else f"its scales are {scale}, not float16"


def integers(weight: Weight) -> Int:
    """The format of a weight that `no_integers` had nothing against."""
    assert isinstance(weight.scheme, Scheme) and isinstance(weight.scheme.format, Int)
    return weight.scheme.format


def size_or_row(weight: Weight) -> int:
    """The group size, -1 for a row."""
    size = group_size(weight)
    return -1 if size == weight.shape[1] else size


def divisor(inputs: int, sizes: Sequence[int]) -> int | None:
    """The first of ``sizes`` that cuts a row of ``inputs`` evenly."""
    return next((size for size in sizes if inputs % size == 0), None)
