"""What a step of a model is written down as: instructions on the very tensors that torch made, so that views need no names.

A record is a list in which every tensor is written by one instruction, but for one that is put together of pieces.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dither.kernels import Int8Matrix, PackedMatrix

Matrix = PackedMatrix | Int8Matrix | Tensor


class Unrecordable(Exception):
    """Why a step cannot be written down."""


@dataclass(frozen=True)
class Elementwise:
    """``y = function(a, b)``; names of `dither.kernels.tape`."""

    function: str
    y: Tensor
    a: Tensor
    b: Tensor | float | None = None


@dataclass(frozen=True)
class Multiply:
    """``y = x W^T``; an `Int8Matrix` rounds x first."""

    x: Tensor
    weight: Matrix
    y: Tensor


@dataclass(frozen=True)
class Attend:
    """``q [H, d]``, ``k [G, d]``, ``v [G, e]``, ``y [H, e]``; k and v join those that ``layer`` holds first."""

    layer: int
    q: Tensor
    k: Tensor
    v: Tensor
    y: Tensor
    scale: float


@dataclass(frozen=True)
class Unknown:
    """What a score must not depend on."""

    why: str
    x: tuple[Tensor, ...]
    y: Tensor


Instruction = Elementwise | Multiply | Attend | Unknown


@dataclass
class Record:
    """``lookups``: modules, what they look up ("id" or "place" of the token), and the row that they give; ``place``: the token's, as a number."""

    instructions: list[Instruction] = field(default_factory=list)
    lookups: list[tuple[nn.Module, str, Tensor]] = field(default_factory=list)
    place: Tensor = field(default_factory=lambda: torch.zeros(1, 1, dtype=torch.long))
    logits: Tensor = field(default_factory=lambda: torch.zeros(0))
    held: list[Tensor] = field(default_factory=list)  # so that no two storages share an address


def reads(instruction: Instruction) -> tuple[Tensor, ...]:
    match instruction:
        case Elementwise(a=a, b=b):
            return (a, b) if isinstance(b, Tensor) else (a,)
        case Multiply(x=x):
            return (x,)
        case Attend(q=q, k=k, v=v):
            return q, k, v
        case Unknown(x=x):
            return x


def storage(x: Tensor) -> int:
    return int(x.untyped_storage()._cdata)


def same(one: Record, other: Record) -> bool:
    """Whether two records do the same: the same instructions on the same numbers, in the same order."""
    pairs: dict[int, int] = {}

    def alike(a: Any, b: Any) -> bool:
        if not isinstance(a, Tensor):
            return a is b or (type(a) is type(b) and a == b)
        if not isinstance(b, Tensor) or (a.shape, a.stride(), a.dtype, a.storage_offset()) != (b.shape, b.stride(), b.dtype, b.storage_offset()):
            return False
        if storage(a) in written[0]:
            return pairs.setdefault(storage(a), storage(b)) == storage(b) and storage(b) in written[1]
        return storage(b) not in written[1] and (a.data_ptr() == b.data_ptr() or torch.equal(a, b))

    written = [{storage(i.y) for i in r.instructions} | {storage(y) for _, _, y in r.lookups} | {storage(r.place)} for r in (one, other)]
    if len(one.instructions) != len(other.instructions) or len(one.lookups) != len(other.lookups):
        return False
    lookups = all(m is n and k == j and alike(x, y) for (m, k, x), (n, j, y) in zip(one.lookups, other.lookups, strict=True))
    places = alike(one.place, other.place)
    return lookups and places and all(
        type(a) is type(b) and all(alike(x, y) for x, y in zip(vars(a).values(), vars(b).values(), strict=True))
        for a, b in zip(one.instructions, other.instructions, strict=True)
    )

