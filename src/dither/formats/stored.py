"""WeightScheme: how a matrix is stored in few bits - which tensors, of which sizes - and what they decode to.

`Scheme` (a number format on blocks that share parameters) is one kind; codebooks of vectors and mixed storage are others. Whoever stores,
counts, packs, loads or runs few-bit matrices needs only what is here; a kind that is not a grid brings its own rounding.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from dither.errors import CheckpointError

Layout = dict[str, tuple[tuple[int, ...], torch.dtype]]
"""Shape and type of every stored tensor, by its name."""


class WeightScheme(ABC):
    """Base of all kinds of storage: frozen dataclasses, hashable, registered by ``kind`` for JSON."""

    kind: ClassVar[str]

    @abstractmethod
    def layout(self, rows: int, columns: int) -> Layout:
        """What a matrix ``[rows, columns]`` is stored as. Everything is counted in its bits. ValueError where the matrix does not fit."""

    @abstractmethod
    def decode_stored(self, stored: Mapping[str, Tensor], shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """The values ``[O, I]``, computed in float32 and cast once."""

    @abstractmethod
    def to_json(self) -> dict[str, Any]:
        """The scheme as plain data. All kinds but the grid carry their ``kind``."""

    @classmethod
    @abstractmethod
    def from_json(cls, data: dict[str, Any]) -> WeightScheme:
        """The inverse of `to_json`. Raises ValueError that names the field."""

    def check_stored(self, stored: Mapping[str, Tensor], shape: tuple[int, int]) -> None:
        """Raises CheckpointError where stored values (sizes and types are right by then) make no matrix: not finite, out of range."""
        for key, value in stored.items():
            if value.is_floating_point() and not bool(torch.isfinite(value.to(torch.float32)).all()):
                raise CheckpointError(f"{key}: holds NaN or inf")

    def is_ragged(self, inputs: int, outputs: int = 1) -> bool:
        """Whether the last group of a row is shorter than the others."""
        return False


KINDS: dict[str, type[WeightScheme]] = {}
"""Kinds of storage by name; a file that defines one adds it here."""


def scheme_from_json(data: Any) -> WeightScheme:
    """A scheme of any kind from plain data. Raises ValueError that names the field."""
    if not isinstance(data, dict):
        raise ValueError(f"scheme: must be a mapping, not {type(data).__name__}")
    kind = data.get("kind", "grid")
    if kind not in KINDS:
        raise ValueError(f"scheme.kind: must be one of {', '.join(KINDS)}, not {kind!r}")
    return KINDS[kind].from_json({k: v for k, v in data.items() if k != "kind"})
