"""Blocks: how a matrix ``[O, I]`` (rows = output channels) is cut into blocks whose values share parameters.

A cut is a list of at most four *pieces*: rectangles in which all blocks have one size, seen as ``(rows, groups, n)``. A ragged last group is
a piece of its own, shorter, never padded: padding would change its range, its mean and its error.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dither.formats.format import Params

KINDS = ("tensor", "channel", "group", "token", "tile")
WHOLE = -1  # a size that spans the whole axis


@dataclass(frozen=True)
class Piece:
    """One rectangle of blocks: its place in the matrix, its place in the grid of parameters, and the size of its blocks."""

    rows: slice
    columns: slice
    grid_rows: slice
    grid_columns: slice
    block: tuple[int, int]

    def blocked(self, matrix: Tensor) -> Tensor:
        """``[O, I]`` -> ``(R, C, n)``: the piece's blocks, each flattened."""
        part = matrix[self.rows, self.columns]
        r, c = self.block
        if r == 1:
            return part.reshape(part.shape[0], -1, c) if c else part.reshape(part.shape[0], 1, 0)
        tall, wide = part.shape[0] // r, part.shape[1] // c if c else 1
        return part.reshape(tall, r, wide, c).transpose(1, 2).reshape(tall, wide, r * c)

    def unblocked(self, blocks: Tensor) -> Tensor:
        """The inverse of `blocked`: ``(R, C, n)`` -> the rectangle."""
        r, c = self.block
        if r == 1:
            return blocks.reshape(blocks.shape[0], -1)
        return (
            blocks.reshape(blocks.shape[0], blocks.shape[1], r, c)
            .transpose(1, 2)
            .reshape(blocks.shape[0] * r, blocks.shape[1] * c)
        )

    def of(self, params: Params) -> Params:
        """The piece's part of grid-shaped parameters; those of the whole tensor (shape ``()``) pass through."""
        return {k: v if v.dim() == 0 else v[self.grid_rows, self.grid_columns] for k, v in params.items()}


@dataclass(frozen=True)
class Blocks:
    """Blocks of ``height`` rows by ``width`` columns; -1 spans the axis."""

    kind: str
    height: int
    width: int

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind of blocks must be one of {', '.join(KINDS)}, not {self.kind!r}")
        for name, value in (("height", self.height), ("width", self.width)):
            if value != WHOLE and (not isinstance(value, int) or value < 1):
                raise ValueError(f"{self.kind}: block {name} must be positive or -1, not {value!r}")

    def rows(self, outputs: int) -> int:
        """Rows of a full block."""
        return max(outputs, 1) if self.height == WHOLE else self.height

    def columns(self, inputs: int) -> int:
        """Columns of a full block (more than ``inputs`` where a group is larger than the row)."""
        return max(inputs, 1) if self.width == WHOLE else self.width

    def grid_shape(self, outputs: int, inputs: int) -> tuple[int, int]:
        """Shape of the parameters: ``[O, G]`` for groups, ``[O, 1]`` for channels, ``[1, 1]`` for a tensor."""
        return -(-outputs // self.rows(outputs)), -(-inputs // self.columns(inputs)) if inputs else 1

    def column_groups(self, inputs: int) -> Tensor:
        """``[I]`` int64: the grid column that each input belongs to."""
        return torch.arange(inputs) // self.columns(inputs)

    def row_groups(self, outputs: int) -> Tensor:
        """``[O]`` int64: the grid row that each output belongs to."""
        return torch.arange(outputs) // self.rows(outputs)

    def ragged(self, outputs: int, inputs: int) -> bool:
        """Whether some blocks are smaller than the others."""
        return outputs % self.rows(outputs) != 0 or (
            inputs > self.columns(inputs) and inputs % self.columns(inputs) != 0
        )

    def pieces(self, outputs: int, inputs: int) -> Iterator[Piece]:
        """The rectangles of equal blocks, full ones first."""
        if outputs == 0:
            return
        for rows, grid_rows, tall in _cuts(outputs, self.rows(outputs)):
            for columns, grid_columns, wide in _cuts(inputs, self.columns(inputs)):
                yield Piece(rows, columns, grid_rows, grid_columns, (tall, wide))

    def to_json(self) -> dict[str, Any]:
        return {"kind": self.kind, "height": self.height, "width": self.width}

    def __str__(self) -> str:
        if self.kind == "group":
            return f"group({self.width})"
        return f"tile({self.height}, {self.width})" if self.kind == "tile" else self.kind


def _cuts(length: int, size: int) -> list[tuple[slice, slice, int]]:
    """An axis cut into full blocks and a ragged rest: (place, place in the grid, block size)."""
    full = length // size
    found = [(slice(0, full * size), slice(0, full), size)] if full else []
    if length % size or length == 0:
        found.append((slice(full * size, length), slice(full, full + 1), length - full * size))
    return found


def tensor() -> Blocks:
    """One block: the whole matrix."""
    return Blocks("tensor", WHOLE, WHOLE)


def channel() -> Blocks:
    """One block a row (an output channel)."""
    return Blocks("channel", 1, WHOLE)


def group(size: int) -> Blocks:
    """Runs of ``size`` inputs within a row; -1 is the whole row."""
    if size == WHOLE:
        return channel()
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise ValueError(f"group size must be positive or -1 (the whole row), not {size!r}")
    return Blocks("group", 1, size)


def token() -> Blocks:
    """One block a row of activations: each token has its own parameters."""
    return Blocks("token", 1, WHOLE)


def tile(rows: int, columns: int) -> Blocks:
    """Rectangles of ``rows`` x ``columns`` weights."""
    return Blocks("tile", rows, columns)
