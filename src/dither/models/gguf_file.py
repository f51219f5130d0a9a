"""GGUF files as a `Source`. The weights are decoded tensor by tensor from whatever few-bit type they are stored in.

Which GGUF tensor is which parameter, and how its rows must be put back (llama.cpp reorders those of query and key), is
transformers' own knowledge. It keeps it in two places, an older table of tensor processors and newer conversion rules;
both are used here.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dither.errors import CheckpointError, ModelError
from dither.models import gguf_layout, skeleton
from dither.models.checkpoint import Checkpoint, sample
from dither.models.conversion import Stored
from dither.models.gguf_layout import Layout
from dither.models.gguf_metadata import optional_module, quickly
from dither.models.memory import MemorySource, saved_files
from dither.models.source import NoTokenizer, tied_names

_PIECE = 1 << 21  # weights decoded at a time


class GGUFSource(Checkpoint):
    """One GGUF file. Weights decode to float32, unless the file holds them in a float type."""

    def __init__(self, name: str, path: Path, dtype: torch.dtype | None = None) -> None:
        self._layout = gguf_layout.read_layout(path)
        _require_decoders(self._layout)
        self._config_dict, self._modern = read_config(self._layout)
        config = as_config(path, self._config_dict)
        self._processed: ProcessedTensors | None = None
        super().__init__(name, path, config, dtype)
        self.generation_config = _generation_config(config)

    def _describe(self, model: nn.Module) -> Stored:
        stored = {key: (t.shape, decoded_dtype(t.kind)) for key, t in self._layout.tensors.items()}
        if self._modern:
            return stored
        self._processed = ProcessedTensors(self._layout, self._config_dict, model)
        return self._processed.describe(stored, model)

    def _size(self) -> tuple[int, int]:
        tensors = self._layout.tensors.values()
        return sum(torch.Size(t.shape).numel() for t in tensors), len(tensors)

    def _rules(self, model: nn.Module) -> Sequence[Any]:
        if self._modern:
            theirs = optional_module("transformers.integrations.gguf")

            build = theirs.get_gguf_conversion_mapping
            rules: Sequence[Any] = build(self._layout.scalars["general.architecture"], self.config)
            return rules
        return super()._rules(model)

    def _load(self, key: str, dtype: torch.dtype | None) -> Tensor:
        if self._processed is not None:
            value = self._processed.load(key)
        else:
            value = decode(self._layout, key).to(decoded_dtype(self._layout.tensors[key].kind))
        return value if dtype is None else value.to(dtype)

    def tokenizer(self) -> Any:
        if self._tokenizer is None:
            if not _has_tokenizer(self._layout):
                raise NoTokenizer(f"{self.where}: holds no tokenizer; pass tokens instead of text")
            self._tokenizer = gguf_tokenizer(self.where)
        return self._tokenizer

    def _identity(self) -> Iterator[bytes]:
        yield from sample(self.where)

    def sidecars(self) -> Iterator[tuple[str, str | bytes]]:
        try:
            tokenizer = self.tokenizer()
        except NoTokenizer:
            tokenizer = None
        yield from saved_files(tokenizer, self.generation_config)


class ProcessedTensors:
    """Tensors through transformers' tensor processors: keys are parameter names; several GGUF tensors may make one
    (gate and up)."""

    def __init__(self, layout: Layout, config: dict[str, Any], model: nn.Module) -> None:
        self.layout = layout
        self.processor, self.mapping = tensor_names(layout.scalars["general.architecture"], config, model)
        self.inputs: dict[str, list[str]] = {}
        for key in layout.tensors:
            target = self.mapping.get(key) or self.mapping.get(key.removesuffix(".weight"))
            if target is not None:
                self.inputs.setdefault(target, []).append(key)

    def describe(self, stored: Stored, model: nn.Module) -> Stored:
        """Shapes and types by parameter name. A processor keeps the number of elements, so the module's shape is taken
        where that agrees; what it really makes is compared again when read."""
        expected = model.state_dict()
        found: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        for target, keys in self.inputs.items():
            numel = sum(torch.Size(stored[key][0]).numel() for key in keys)
            agrees = target in expected and expected[target].numel() == numel
            found[target] = (tuple(expected[target].shape) if agrees else stored[keys[0]][0], stored[keys[0]][1])
        used = {key for keys in self.inputs.values() for key in keys}
        return found | {key: value for key, value in stored.items() if key not in used}

    def load(self, target: str) -> Tensor:
        made: dict[str, Any] = {"tensors": {}}
        value: Tensor | None = None
        for key in self.inputs[target]:
            weights = decode(self.layout, key).numpy()
            result = self.processor.process(
                weights=weights, name=key, tensor_key_mapping=self.mapping, parsed_parameters=made
            )
            if result.name is not None and self.mapping.get(result.name) == target:
                value = torch.from_numpy(np.ascontiguousarray(result.weights))
        value = made["tensors"].get(target) if value is None else value
        if value is None:
            raise CheckpointError(
                f"{self.layout.path}: transformers makes no tensor {target} of {self.inputs[target]}; report this model"
            )
        return value.to(decoded_dtype(self.layout.tensors[self.inputs[target][0]].kind))


def tensor_names(architecture: str, config: dict[str, Any], model: nn.Module) -> tuple[Any, dict[str, str]]:
    """transformers' processor for the tensors of a GGUF architecture, and which parameter of ``model`` each GGUF name is."""
    from transformers import modeling_gguf_pytorch_utils

    theirs: Any = modeling_gguf_pytorch_utils
    processor: Any = theirs.TENSOR_PROCESSORS.get(architecture, theirs.TensorProcessor)(config=config)
    return processor, theirs.get_gguf_hf_weights_map(_Shallow(model), processor)


class _Shallow:
    """A module whose names are looked up at the top and two levels below: every deeper level costs a new table, and
    adds nothing."""

    def __init__(self, module: nn.Module, levels: int = 2) -> None:
        self.module, self.levels, self.config = module, levels, getattr(module, "config", None)

    def state_dict(self) -> dict[str, Any]:
        return self.module.state_dict()

    def named_children(self) -> list[tuple[str, _Shallow]]:
        return [(n, _Shallow(m, self.levels - 1)) for n, m in self.module.named_children()] if self.levels > 0 else []


def decode(layout: Layout, key: str) -> Tensor:
    """One tensor as float32, read and decoded in pieces: memory is the result and one piece."""
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
    from gguf.quants import dequantize

    tensor = layout.tensors[key]
    kind = GGMLQuantizationType(tensor.kind)
    block, width = GGML_QUANT_SIZES[kind]
    result = torch.empty(tensor.shape)
    flat = result.numpy().reshape(-1)
    step = max(_PIECE // block, 1)  # blocks; they do not depend on each other, so rows do not matter
    handle = os.open(layout.path, os.O_RDONLY)
    try:
        for begin in range(0, tensor.nbytes // width, step):
            count = min(step, tensor.nbytes // width - begin)
            raw = os.pread(handle, count * width, tensor.offset + begin * width)
            if len(raw) != count * width:
                raise CheckpointError(
                    f"{layout.path}: ends inside tensor {key}, it was cut while in use; copy or download it again"
                )
            values = np.frombuffer(raw, dtype=np.uint8).reshape(1, -1)
            flat[begin * block : (begin + count) * block] = dequantize(values, kind).reshape(-1)
    finally:
        os.close(handle)
    return result


def decoded_dtype(kind: int) -> torch.dtype:
    """The type that holds a stored type's values without loss (few-bit types: scale x code + offset, so float32)."""
    from gguf.constants import GGMLQuantizationType

    floats = {GGMLQuantizationType.F16: torch.float16, GGMLQuantizationType.BF16: torch.bfloat16}
    return floats.get(GGMLQuantizationType(kind), torch.float32)


def _require_decoders(layout: Layout) -> None:
    """Raises ModelError for a type of weight that the gguf package cannot decode."""
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
    from gguf.quants import dequantize

    for kind in {tensor.kind for tensor in layout.tensors.values()}:
        named = GGMLQuantizationType(kind)
        try:
            dequantize(np.zeros((1, GGML_QUANT_SIZES[named][1]), dtype=np.uint8), named)
        except NotImplementedError:
            raise ModelError(
                f"{layout.path}: holds weights of type {named.name}, which cannot be decoded; "
                "use another file of this model"
            ) from None


def read_config(layout: Layout) -> tuple[dict[str, Any], bool]:
    """transformers' config of a GGUF file as a dict, and whether its newer conversion rules cover this kind of
    model."""
    try:
        from transformers import modeling_gguf_pytorch_utils

        modern = optional_module("transformers.integrations.gguf")
        architecture = layout.scalars["general.architecture"]
        if architecture in getattr(modern, "GGUF_CONFIG_ARCHS", ()) and modern.is_gguf_arch_supported(architecture):
            return modern.get_gguf_config(*modern.read_gguf_metadata(str(layout.path))), True
        processed: Any = modeling_gguf_pytorch_utils
        return quickly(lambda: processed.load_gguf_checkpoint(str(layout.path), return_tensors=False)["config"]), False
    except Exception as error:  # foreign code on foreign metadata
        raise ModelError(f"{layout.path}: transformers cannot use this GGUF file ({_line(error)})") from None


def _has_tokenizer(layout: Layout) -> bool:
    """Whether the file has a tokenizer: one that has none may say so."""
    return str(layout.scalars.get("tokenizer.ggml.model", "none")) != "none"


def gguf_tokenizer(path: Path) -> Any:
    """The tokenizer inside a GGUF file. Raises ModelError where transformers cannot use it."""
    from transformers import AutoTokenizer

    try:
        return quickly(lambda: AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True))
    except Exception as error:  # a vocabulary can be wrong in many ways
        raise ModelError(f"{path}: its tokenizer cannot be used ({_line(error)})") from None


def as_config(path: Path, config: Mapping[str, Any]) -> Any:
    """The transformers config object of a dict that has a ``model_type``."""
    from transformers import CONFIG_MAPPING

    try:
        return CONFIG_MAPPING[config["model_type"]].from_dict(dict(config))
    except Exception as error:
        raise ModelError(f"{path}: transformers cannot use its metadata ({_line(error)})") from None


def _generation_config(config: Any) -> Any:
    from transformers import GenerationConfig

    try:
        return GenerationConfig.from_model_config(config)
    except (ValueError, TypeError):
        return None


def _line(error: BaseException) -> str:
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= 200 else text[:197] + "..."


def whole(name: str, path: Path, dtype: torch.dtype | None, reason: str) -> MemorySource:
    """Let transformers decode the whole file into memory: for models whose parameters cannot be made one at a time."""
    from transformers import modeling_gguf_pytorch_utils

    theirs: Any = modeling_gguf_pytorch_utils
    layout = gguf_layout.read_layout(path)
    config = as_config(path, read_config(layout)[0])
    model: Any = skeleton.build(config, skeleton.auto_class(config), "sdpa", torch.float32, where=path)
    try:
        tensors = theirs.load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=model, torch_dtype=dtype)[
            "tensors"
        ]
        missing, _ = model.load_state_dict(tensors, strict=False, assign=True)
    except Exception as error:  # foreign code on foreign data
        raise ModelError(f"{path}: transformers cannot load it ({_line(error)})") from None
    tokenizer = gguf_tokenizer(path) if _has_tokenizer(layout) else None
    ties = tied_names(model)
    lost = [key for key in missing if key not in ties]
    if lost:
        raise CheckpointError(f"{path}: lacks the tensor {lost[0]} ({len(lost)} missing); copy or download it again")
    if hasattr(model, "tie_weights"):
        model.tie_weights()
    return MemorySource(
        model, tokenizer, name=name, notes=[f"{name}: loaded whole into memory by transformers ({reason})"]
    )
