"""dither's own checkpoint: safetensors, ``config.json``, ``dither.json`` (the report). transformers loads it after ``import dither``.

``config.json`` carries ``quantization_config``: ``quant_method`` "dither", the schemes in use, and for each replaced parameter its layer, kind,
scheme and shape. A class registered with transformers (`Quantizer`) puts the quantized modules in place before the weights arrive.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dither import models
from dither.errors import CheckpointError, DitherError, ModelError
from dither.formats import QTensor, scheme_from_json
from dither.formats.qtensor import aligned
from dither.models.checkpoint import folder_tokenizer
from dither.models.safetensors_file import read_folder
from dither.models.source import NoTokenizer, tied_names
from dither.quant.assemble import fill, install, tie
from dither.quant.attention_inputs import put_operands
from dither.quant.inputs import InputRounding
from dither.quant.linear import QuantWeight, share
from dither.quant.outcome import REPORT, Report
from dither.quant.recipe import Recipe
from dither.quant.store import PARTIAL, Store, read_tensors
from dither.quant.surroundings import Surroundings, put_turns, surround
from dither.quant.unit import ADDED_BIAS, INPUTS, Unit

METHOD = "dither"
VERSION = 1
APART = "apart"
KINDS = ("linear", "embedding", "parameter")


def quantization_config(units: Sequence[Unit], recipe: Recipe, around: Surroundings, apart: Sequence[str] = ()) -> dict[str, Any]:
    """The record that tells a loader which parameters are few-bit, and how; and what else happens at run time. ``apart``: names that share their
    tensor with others in the float model, but are stored by themselves."""
    schemes: list[dict[str, Any]] = []
    layers: dict[str, Any] = {}
    for unit in units:
        for name, entry in sorted(unit.replaced.items()):  # units read back from disk have them in this order
            scheme = entry["scheme"]
            if scheme not in schemes:
                schemes.append(scheme)
            layers[name] = {k: v for k, v in entry.items() if k not in ("scheme", "bytes")} | {
                "scheme": schemes.index(scheme)
            }
    found = {"quant_method": METHOD, "version": VERSION, "recipe": recipe.name, "schemes": schemes, "layers": layers}
    return found | around.to_json() | ({APART: list(apart)} if apart else {})


def replaced_of(config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The ``replaced`` map of `Unit`, from a ``quantization_config``. Raises CheckpointError where it makes no sense."""
    try:
        if config["version"] > VERSION:
            raise CheckpointError(
                f"the checkpoint is of format {config['version']}, this dither reads {VERSION}: update dither"
            )
        schemes = config["schemes"]
        for scheme in schemes:
            scheme_from_json(scheme)
        return {str(name): _entry(name, entry, schemes) for name, entry in config["layers"].items()}
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"config.json: quantization_config is damaged ({type(error).__name__}: {error}); get the checkpoint again"
        ) from None


def _entry(name: str, entry: Mapping[str, Any], schemes: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One layer's record, checked. Raises ValueError, KeyError, IndexError, TypeError."""
    shape, storage, which = entry["shape"], entry["storage"], entry["scheme"]
    sizes = [*shape, *storage, which]
    if not all(type(n) is int and n >= 0 for n in sizes):
        raise ValueError(f"{name}: its sizes are no counts: {sizes}")
    if len(shape) != 2 or math.prod(shape) != math.prod(storage):
        raise ValueError(f"{name}: a matrix {shape} cannot be stored as {storage}")
    if entry["kind"] not in KINDS or type(entry["swapped"]) is not bool or not isinstance(entry["prefix"], str):
        raise ValueError(f"{name}: its kind, prefix or order is unknown")
    scheme_from_json(schemes[which]).layout(*shape)  # the matrix must fit the scheme
    if entry.get(INPUTS) is not None:
        InputRounding.from_json(entry[INPUTS])
    if type(entry.get(ADDED_BIAS, False)) is not bool:
        raise ValueError(f"{name}: {ADDED_BIAS} must be true or false")
    return {**entry, "scheme": schemes[which]}


def finish(store: Store, units: int, quantization: dict[str, Any], source: models.Source, report: Report) -> None:
    """Turn finished units into a checkpoint that loads on its own; ``quantization``: what `quantization_config` gives."""
    config: dict[str, Any] = {} if source.config is None else source.config.to_dict()
    config.pop("quantization_config", None)
    config["quantization_config"] = quantization
    if config and source.config is not None and config.get("dtype") is None:  # a loader would take the type of the first stored tensor, a scale
        config["dtype"] = str(source.dtype).removeprefix("torch.")
    store.finish(units, config, {"report": report.stored()}, source.sidecars())


def load(path: str | Path, dtype: torch.dtype | None = None, model: nn.Module | None = None) -> tuple[nn.Module, Any]:
    """A checkpoint that dither wrote: ``(model, tokenizer)``, the tokenizer None where there is none.

    ``dtype``: of what is not quantized, and of the activations (None: as stored); what is quantized stays as stored. ``model``: the float
    module, where it is none of transformers'; it is changed in place, and ``dtype`` must be left out.

    Raises ModelError (no such folder, not a checkpoint of dither's), CheckpointError (incomplete or damaged).
    """
    folder = Path(path)
    if not folder.is_dir():
        raise ModelError(f"{path}: there is no such folder")
    if (folder / PARTIAL).exists():
        raise CheckpointError(
            f"{path}: the run that makes it has not finished; run the same quantize command again: it resumes"
        )
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{path}: has no config.json, so it is no checkpoint")
    config = read_config(folder)
    _check_sizes(folder, replaced_of(config["quantization_config"]))
    if model is not None:
        if dtype is not None:
            raise ValueError("dtype: a module of your own gets the types that are stored; leave dtype out")
        return _fill(model, config, folder), None
    return _pretrained(folder, dtype), _tokenizer(folder)


def read_config(folder: Path) -> dict[str, Any]:
    """``config.json`` of a checkpoint of ours. Raises CheckpointError (damaged), ModelError (of a float model, or of another method)."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        method = (config.get("quantization_config") or {}).get("quant_method")
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path}: is no readable JSON object ({error}); get the checkpoint again") from None
    if method != METHOD:
        kind = "a float model" if method is None else f"quantized by {method}"
        raise ModelError(
            f"{folder}: is {kind}, no checkpoint of dither; dither.load_float reads what transformers reads"
        )
    found: dict[str, Any] = config
    return found


def align(model: nn.Module) -> None:
    """Moves what a loader left at addresses that are no multiples of a number's size; in place, so what is shared stays shared."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.data_ptr() % tensor.element_size():
            tensor.data = aligned(tensor.data)


def check_modules(model: nn.Module) -> None:
    """Raises CheckpointError, by name, where a few-bit module holds what its scheme cannot mean."""
    for name, module in model.named_modules():
        if isinstance(module, QuantWeight | InputRounding):
            try:
                module.check()
            except CheckpointError as error:
                raise CheckpointError(f"{name}.{error}; get the checkpoint again") from None


def _check_sizes(folder: Path, replaced: Mapping[str, Mapping[str, Any]]) -> None:
    """Raises CheckpointError unless the files are whole and the few-bit tensors in them have the sizes and types that their schemes say."""
    entries = read_folder(folder)
    for entry in replaced.values():
        wanted = QTensor.empty(scheme_from_json(entry["scheme"]), tuple(entry["shape"]), device="meta").tensors()
        for key, like in wanted.items():
            name = f"{entry['prefix']}.{key}"
            found = entries.get(name)
            if found is not None and (tuple(found.shape), found.dtype) != (tuple(like.shape), like.dtype):
                raise CheckpointError(
                    f"{folder}: {name} is {found.dtype} {list(found.shape)} in the weights, but {like.dtype} {list(like.shape)} "
                    "by config.json; get the checkpoint again"
                )


def _fill(model: nn.Module, config: Mapping[str, Any], folder: Path) -> nn.Module:
    """The stored tensors in a float module of the user's own."""
    models.separate(model, _apart(config["quantization_config"]))
    aliases = tied_names(model)
    around = Surroundings.from_json(config["quantization_config"])
    put_turns(model, around.turns)
    install(model, replaced_of(config["quantization_config"]))
    put_operands(model, around.attention)
    surround(model, config["quantization_config"])
    share(model, aliases)
    tensors = read_tensors(folder)
    firsts = {name for name, _ in [*model.named_parameters(), *model.named_buffers()]}  # a module has one here, however often it is registered
    missing = [name for name in model.state_dict() if name in firsts and name not in tensors and name not in aliases]
    if missing:
        raise CheckpointError(f"{folder}: lacks the tensor {missing[0]} ({len(missing)} missing); is it of this model?")
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    for name, tensor in tensors.items():
        if name in shapes and shapes[name] != tensor.shape:
            raise CheckpointError(
                f"{folder}: {name} is {list(tensor.shape)}, but {list(shapes[name])} in the model; is it of this model?"
            )
    fill(model, tensors)
    tie(model, aliases)
    align(model)
    check_modules(model)
    return model.eval()


def _apart(config: Mapping[str, Any]) -> list[str]:
    names = config.get(APART, [])
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise CheckpointError(f"config.json: quantization_config is damaged ({APART} is no list of names); get the checkpoint again")
    return names


def _pretrained(folder: Path, dtype: torch.dtype | None) -> nn.Module:
    """The model, by transformers; whatever it has to say about damaged files in one line."""
    from transformers.utils import logging

    from dither.quant import hf

    hf.register()
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]  # it prints tables of what we say in a line
    try:
        network, info = models.auto_class(folder).from_pretrained(
            folder, dtype=dtype or "auto", local_files_only=True, output_loading_info=True
        )
    except DitherError:
        raise
    except Exception as error:  # each kind of damage has its own
        text = " ".join(str(error).split())
        raise CheckpointError(
            f"{folder}: transformers cannot load it ({text[:200]}); get the checkpoint again"
        ) from None
    finally:
        logging.set_verbosity(verbosity)
    lost = sorted({*info["missing_keys"], *info["unexpected_keys"], *(key for key, *_ in info["mismatched_keys"])})
    if lost:  # transformers fills what is missing with random numbers
        raise CheckpointError(
            f"{folder}: the tensor {lost[0]} is missing, or of another model ({len(lost)} such); get the checkpoint again"
        )
    model: nn.Module = network.eval()
    return model


def _tokenizer(folder: Path) -> Any:
    try:
        return folder_tokenizer(str(folder), folder)
    except NoTokenizer:
        return None


def is_checkpoint(path: str | Path) -> bool:
    """Whether ``path`` is a folder that dither wrote, finished or not."""
    folder = Path(path)
    if (folder / REPORT).is_file() or (folder / PARTIAL).is_dir():
        return True
    try:
        return bool(read_config(folder))
    except ModelError:
        return False
