"""From units to a model: put quantized modules in place of float ones, and fill in the tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dither import models
from dither.errors import CheckpointError, ModelError
from dither.formats import QTensor, scheme_from_json
from dither.quant.attention_inputs import owners, put_operands
from dither.quant.inputs import InputRounding
from dither.quant.linear import QuantEmbedding, QuantLinear, QuantWeight, as_stored, attach, share
from dither.quant.unit import ADDED_BIAS, INPUTS, Unit


def install(model: nn.Module, replaced: Mapping[str, Mapping[str, Any]], *, device: str = "meta") -> None:
    """Exchange modules (or parameters) of a float model for quantized ones without values, as ``replaced`` says (see `Unit`).

    A module that the model holds in several places is exchanged in all. Raises CheckpointError where the model has no such layer, or one of
    another shape.
    """
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for part in model.modules():
        for key, child in part._modules.items():
            places.setdefault(id(child), []).append((part, key))
    for name, entry in replaced.items():
        path, _, leaf = name.rpartition(".")
        scheme, flat = scheme_from_json(entry["scheme"]), tuple(entry["shape"])
        try:
            module = model.get_submodule(path)
            parameter = getattr(module, leaf)
        except AttributeError:
            raise CheckpointError(f"{name}: is in the checkpoint, but not in the model") from None
        stored = tuple(parameter.shape)
        if stored != tuple(entry["storage"]):
            raise CheckpointError(f"{name}: is {entry['storage']} in the checkpoint, but {list(stored)} in the model")
        tensors = QTensor.empty(scheme, flat, device=device).tensors()
        if entry["kind"] == "parameter":
            attach(module, leaf, QuantWeight(scheme, flat, tensors), stored, swapped=entry["swapped"])
            continue
        if isinstance(module, nn.Embedding):
            new: nn.Module = QuantEmbedding(scheme, flat[0], flat[1], module.padding_idx, tensors, module.weight.dtype)
        else:
            bias = getattr(module, "bias", None)
            if bias is None and entry.get(ADDED_BIAS):
                bias = torch.zeros(flat[0], dtype=parameter.dtype, device=device)
            rounds = entry.get(INPUTS)
            inputs = None if rounds is None else InputRounding.from_json(rounds, device)
            new = QuantLinear(scheme, flat[1], flat[0], None if bias is None else bias.detach(), tensors, inputs=inputs)
        for part, key in places.get(id(module), ()):
            setattr(part, key, new)


def fill(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Assign ``tensors`` to the model's parameters and buffers of the same names. Raises CheckpointError for names it lacks."""
    _, unexpected = model.load_state_dict(dict(tensors), strict=False, assign=True)
    if unexpected:
        raise CheckpointError(
            f"{unexpected[0]}: is in the checkpoint, but not in the model ({len(unexpected)} such tensors)"
        )


def assemble(source: models.Source, units: Sequence[Unit]) -> nn.Module:
    """The quantized model, in memory."""
    model = source.skeleton()
    for unit in units:
        install(model, unit.replaced)
        put_operands(model, unit.attention)
    for unit in units:
        fill(model, unit.tensors)
    share(model, source.tied)
    tie(model, source.tied)
    check_whole(model, source.name)
    return model.eval()


def tie(model: nn.Module, tied: Mapping[str, str]) -> None:
    """Let float parameters read the tensors that they share, alias -> owner. Aliases that few-bit modules replaced are passed over."""
    for alias, owner in tied.items():
        path, _, leaf = alias.rpartition(".")
        if leaf in (part := model.get_submodule(path))._parameters:
            part._parameters[leaf] = model.get_parameter(owner)


def check_whole(model: nn.Module, name: str) -> None:
    """Raises ModelError where a tensor of a finished model has got no values."""
    for n, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_meta:
            raise ModelError(f"{name}: {n} shares its values with another tensor in a way that cannot be kept; give it values of its own")


def restore(module: nn.Module, unit: Unit, prefix: str) -> None:
    """Write a finished unit's values, decoded, into a float module of the same block."""
    cut = len(prefix) + 1 if prefix else 0
    for name, entry in unit.replaced.items():
        if entry.get(ADDED_BIAS):
            module.get_submodule(name[cut:].rpartition(".")[0]).bias = nn.Parameter(torch.zeros(entry["shape"][0]), requires_grad=False)
    own = dict(module.named_parameters()) | dict(module.named_buffers())
    held: dict[str, dict[str, Tensor]] = {}
    prefixes = {entry["prefix"]: name for name, entry in unit.replaced.items()}
    inputs = {f"{prefix}.{INPUTS}" for prefix in prefixes} | owners(unit.attention)
    for name, tensor in unit.tensors.items():
        owner, _, key = name.rpartition(".")
        if name[cut:] in own:
            own[name[cut:]].data.copy_(tensor)
        elif owner not in inputs:  # streams run on float activations
            held.setdefault(prefixes[owner], {})[key] = tensor
    for name, tensors in held.items():
        entry = unit.replaced[name]
        qtensor = QTensor.from_tensors(tensors, scheme_from_json(entry["scheme"]), tuple(entry["shape"]))
        own[name[cut:]].data.copy_(
            as_stored(qtensor.dequantize(torch.float32), entry["storage"], swapped=entry["swapped"])
        )
