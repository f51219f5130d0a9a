"""dither's own checkpoint: safetensors, ``config.json``, ``dither.json`` (the report). transformers loads it after ``import dither``.

``config.json`` carries ``quantization_config``: ``quant_method`` "dither", the schemes in use, and for each replaced parameter its layer, kind,
scheme and shape. A class registered with transformers (`Quantizer`) puts the quantized modules in place before the weights arrive.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dither import models
from dither.errors import CheckpointError, ModelError
from dither.formats import Scheme
from dither.quant.assemble import fill, install
from dither.quant.outcome import REPORT, Report
from dither.quant.recipe import Recipe
from dither.quant.store import Store, read_tensors
from dither.quant.unit import Unit

METHOD = "dither"
VERSION = 1


def quantization_config(units: Sequence[Unit], recipe: Recipe) -> dict[str, Any]:
    """The record that tells a loader which parameters are few-bit, and how."""
    schemes: list[dict[str, Any]] = []
    layers: dict[str, Any] = {}
    for unit in units:
        for name, entry in unit.replaced.items():
            scheme = entry["scheme"]
            if scheme not in schemes:
                schemes.append(scheme)
            layers[name] = {k: v for k, v in entry.items() if k not in ("scheme", "bytes")} | {
                "scheme": schemes.index(scheme)
            }
    return {"quant_method": METHOD, "version": VERSION, "recipe": recipe.name, "schemes": schemes, "layers": layers}


def replaced_of(config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The ``replaced`` map of `Unit`, from a ``quantization_config``. Raises CheckpointError where it makes no sense."""
    try:
        if config["version"] > VERSION:
            raise CheckpointError(
                f"the checkpoint is of format {config['version']}, this dither reads {VERSION}: update dither"
            )
        schemes = config["schemes"]
        for scheme in schemes:
            Scheme.from_json(scheme)
        return {name: {**entry, "scheme": schemes[entry["scheme"]]} for name, entry in config["layers"].items()}
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"config.json: quantization_config is damaged ({type(error).__name__}: {error})"
        ) from None


def finish(store: Store, units: Sequence[Unit], source: models.Source, recipe: Recipe, report: Report) -> None:
    """Turn finished units into a checkpoint that loads on its own."""
    config: dict[str, Any] = {} if source.config is None else source.config.to_dict()
    config.pop("quantization_config", None)
    config["quantization_config"] = quantization_config(units, recipe)
    store.finish(len(units), config, {"report": report.stored()}, source.sidecars())


def load(path: str | Path, dtype: torch.dtype | None = None, model: nn.Module | None = None) -> tuple[nn.Module, Any]:
    """A checkpoint that dither wrote: ``(model, tokenizer)``. ``model``: the float module, where it is none of transformers'.

    Raises ModelError (no such folder), CheckpointError (incomplete or damaged).
    """
    folder = Path(path)
    if not folder.is_dir():
        raise ModelError(f"{path}: there is no such folder")
    if (folder / ".partial").exists():
        raise CheckpointError(
            f"{path}: the run that makes it has not finished; run the same quantize command again: it resumes"
        )
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{path}: has no config.json, so it is no checkpoint")
    models.check_folder(folder)
    if model is not None:
        config = json.loads((folder / "config.json").read_text())
        install(model, replaced_of(config["quantization_config"]))
        fill(model, read_tensors(folder))
        return model.eval(), None
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from dither.quant import hf

    hf.register()
    network = models.auto_class(folder).from_pretrained(folder, dtype=dtype or "auto")
    has_tokenizer = any((folder / n).is_file() for n in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model"))
    tokenizer = AutoTokenizer.from_pretrained(folder) if has_tokenizer else None
    assert AutoModelForCausalLM is not None
    return network.eval(), tokenizer


def is_checkpoint(path: str | Path) -> bool:
    """Whether ``path`` is a folder that dither wrote, finished or not."""
    folder = Path(path)
    return (folder / REPORT).is_file() or (folder / ".partial").is_dir()


Tensors = Mapping[str, Tensor]
