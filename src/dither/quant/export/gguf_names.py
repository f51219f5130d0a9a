"""What a model is called in GGUF, and where each of its parameters goes: transformers' tables for reading, turned round.

transformers reads a GGUF tensor in two steps: a table names the parameter that it is, and a processor puts its values right (rows of query and
key in another order, matrices transposed, norms stored plus one). Here the processor is run on row and column numbers instead of weights: what
comes out shows the order it puts rows in, and so its inverse. What no order of rows, transposition or constant explains, is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from dither.errors import ExportError
from dither.formats import QTensor
from dither.models.gguf_file import tensor_names
from dither.models.gguf_metadata import optional_module

Array = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Architecture:
    """``name``: in GGUF; ``keys``: metadata key, without the name in front -> attribute of transformers' config (None: not read)."""

    name: str
    keys: Mapping[str, str | None]


def architecture(model_type: str) -> Architecture:
    """Raises ExportError where transformers, or the gguf package, knows no GGUF of this type of model, or reads it by rules that only go one way."""
    from gguf import MODEL_ARCH_NAMES
    from transformers.integrations.ggml import GGUF_CONFIG_MAPPING

    table: Any = GGUF_CONFIG_MAPPING
    entry = next((key for key in table if model_type in (key, f"{key}_text") and key not in ("general", "tokenizer")), None)
    spellings = [] if entry is None else [entry, entry.replace("_", ""), entry.replace("_", "-")]
    name = next((name for name in spellings if name in MODEL_ARCH_NAMES.values()), None)
    if entry is None or name is None:
        raise ExportError(f"transformers and the gguf package have no common name for models of type {model_type}")
    if name in getattr(optional_module("transformers.integrations.gguf"), "GGUF_CONFIG_ARCHS", ()):
        raise ExportError(f"how transformers reads models of type {model_type} cannot be turned round yet")
    return Architecture(name, table[entry])


@dataclass(frozen=True)
class Place:
    """Where a parameter goes. ``rows``: the parameter's row that each row of the file is (None: in order); ``transposed``; ``less``: what the file's
    values are smaller by."""

    name: str
    rows: Tensor | None = None
    transposed: bool = False
    less: float = 0.0

    def values(self, parameter: Tensor) -> Tensor:
        """A float parameter as the file has it."""
        value = parameter.T if self.transposed else parameter
        value = value if self.rows is None else value[self.rows]
        return value if self.less == 0 else value.float() - self.less

    def few_bit(self, tensor: QTensor) -> QTensor:
        """A few-bit matrix ``[O, I]``, which is how the file has it up to the order of rows."""
        return tensor if self.rows is None else tensor.rows(self.rows)


def places(name: str, config: dict[str, Any], model: nn.Module) -> dict[str, Place]:
    """Where each parameter of ``model`` goes in a file of architecture ``name``. Raises ExportError for the first that has no place."""
    processor, mapping = tensor_names(name, config, model)
    of = {parameter: key for key, parameter in reversed(list(mapping.items()))}
    owners = dict(model.named_parameters())  # tied names once
    found = {}
    for parameter, value in owners.items():
        if parameter not in of:
            raise ExportError(f"gguf: {parameter} has no name in a GGUF of this architecture ({name})")
        several = [key for key, target in mapping.items() if target == parameter]
        if len(several) > 1:
            raise ExportError(f"gguf: {parameter} is {' and '.join(several)} in a GGUF, which this export does not take apart")
        found[parameter] = _probed(of[parameter], tuple(value.shape), processor, mapping)
    return found


def _probed(key: str, shape: tuple[int, ...], processor: Any, mapping: dict[str, str]) -> Place:
    """The place of a parameter of ``shape``, from what the processor does to row and column numbers."""
    unknown = ExportError(f"gguf: transformers reads {key} by a rule that cannot be turned round yet")

    def read(numbers: Array) -> Array:
        result = processor.process(weights=numbers, name=key, tensor_key_mapping=mapping, parsed_parameters={"tensors": {}})
        if result.name != key:
            raise unknown
        found: Array = numbers if result.weights is numbers else np.asarray(result.weights)
        return found

    try:
        if len(shape) == 1:
            return _vector(key, read(np.arange(shape[0], dtype=np.float32)), shape)
        i, j = np.indices(shape, dtype=np.float32, sparse=True)
        for there in (shape, shape[::-1]) if len(shape) == 2 else ():
            row, column = (np.broadcast_to(n, there) for n in np.indices(there, dtype=np.float32, sparse=True))
            rows, columns = read(row), read(column)
            if rows is row and columns is column:
                return Place(key)
            if rows.shape != shape or columns.shape != shape:
                continue
            if (rows == j).all() and (columns == i).all():
                return Place(key, transposed=True)
            if (rows == rows[:, :1]).all() and (columns == j).all():
                return Place(key, _order(key, rows[:, 0]))
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise unknown from error
    raise unknown


def _vector(key: str, read: Array, shape: tuple[int, ...]) -> Place:
    """The place of a vector whose numbers 0, 1, ... are read as ``read``."""
    if read.shape != shape:
        raise ValueError(f"{key}: is read as {read.shape}")
    constant = float(read[0]) if len(read) else 0.0
    if constant and np.array_equal(read - constant, np.arange(len(read))):
        return Place(key, less=constant)
    return Place(key, _order(key, read))


def _order(key: str, read: Array) -> Tensor | None:
    """The parameter's row that each row of the file is, where the parameter's row i is read from the file's row ``read[i]``."""
    order = torch.from_numpy(read.astype(np.int64))
    inverse = order.argsort()
    if not torch.equal(order[inverse], torch.arange(len(order))):
        raise ExportError(f"gguf: transformers does not read every row of {key}")
    return None if torch.equal(inverse, torch.arange(len(order))) else inverse
