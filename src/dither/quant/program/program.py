"""A recorded step as a program: its instructions on a `dither.kernels.tape.Tape`, with keys and values of its own, for one sequence or a few at
once, or for many tokens of a prompt.

Products of the same row stand together, so that its preparation serves all.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from dither.kernels import PackedMatrix
from dither.kernels.tape import PANEL, Row, Tape
from dither.quant.linear import QuantEmbedding
from dither.quant.program.instructions import Attend, Elementwise, Instruction, Multiply, Record
from dither.quant.program.memory import Group, Memory

_SPARE = 64  # tokens that keys and values have room for at the least
PIECE = 512  # tokens of a prompt that are read at once; each takes as much memory as a step


class KeysValues:
    """Of one sequence: for each layer keys ``[G, capacity / PANEL, d, PANEL]`` and values ``[G, capacity, e]``, in turns; ``length``: tokens that
    they hold."""

    def __init__(self, held: list[Tensor], length: int) -> None:
        self.length, self.capacity = length, held[1].shape[1]
        self.held = held
        self.addresses = [t.data_ptr() for t in held]

    @classmethod
    def of(cls, cache: DynamicCache) -> KeysValues:
        """A copy of what transformers' cache holds."""
        layers: list[Any] = list(cache.layers)
        length = cache.get_seq_length()
        held = []
        for layer in layers:
            keys, values = (t[0].new_zeros(t.shape[1], _room(length), t.shape[3]) for t in (layer.keys, layer.values))  # [G, capacity, d]
            keys[:, :length], values[:, :length] = layer.keys[0], layer.values[0]
            held += [keys.unflatten(1, (-1, PANEL)).transpose(2, 3).contiguous(), values]
        return cls(held, length)

    def copy(self) -> KeysValues:
        """The same sequence again, to go on in another way."""
        twin = copy.copy(self)
        twin.held = [t.clone() for t in self.held]
        twin.addresses = [t.data_ptr() for t in twin.held]
        return twin

    def make_room(self, tokens: int = 1) -> None:
        """For so many more."""
        if self.length + tokens <= self.capacity:
            return
        before, old_capacity, self.capacity = self.held, self.capacity, _room(self.length + tokens - 1)
        self.held = [t.new_zeros(t.shape[0], self.capacity * t.shape[1] // old_capacity, *t.shape[2:]) for t in before]
        for new, old in zip(self.held, before, strict=True):
            new[:, : old.shape[1]] = old
        self.addresses = [t.data_ptr() for t in self.held]


def _room(length: int) -> int:
    """For so many tokens and some more."""
    return -(-(length + max(_SPARE, length // 8)) // PANEL) * PANEL


class Program:
    """``lock``: its memory serves one step at a time."""

    def __init__(self, found: Record) -> None:
        self.lock = threading.Lock()
        instructions = together(found.instructions)
        memory = Memory(found, instructions, PIECE)
        self.lookups: list[tuple[nn.Module, str, Tensor]] = []  # and where the rows of all tokens go, [PIECE, 1, 1, d]
        self.scores = memory.rows(found.logits)[:, 0, -1]
        self.empty = [(i.k, i.v) for i in sorted((i for i in found.instructions if isinstance(i, Attend)), key=lambda i: i.layer)]
        weights = [i.weight for i in found.instructions if isinstance(i, Multiply)]
        self.reads_prompts = not any(isinstance(w, Tensor) for w in weights[:-1])
        self.tape = Tape(memory.buffer)
        self.tape.length(memory(found.place).view(1))
        for module, name, y in found.lookups:
            if (table := rows_of(module)) is not None and (isinstance(table, PackedMatrix) or table.dtype == y.dtype):
                self.tape.lookup(table, memory(y).view(-1), by_length=name == "place")
            else:
                self.lookups.append((module, name, memory.rows(y)))
        for group in instructions:
            write_on(self.tape, group, memory, memory)

    def start(self, tokens: int) -> KeysValues:
        """Nothing yet, with room for so many tokens and some more. What is there is read along, but counts for nothing."""
        capacity = _room(tokens)
        sizes = [((k.shape[0], capacity // PANEL, k.shape[1], PANEL), (v.shape[0], capacity, v.shape[1])) for k, v in self.empty]
        return KeysValues([t.new_empty(n) for pair, both in zip(self.empty, sizes, strict=True) for t, n in zip(pair, both, strict=True)], 0)

    def read(self, tokens: Sequence[int], held: KeysValues) -> Tensor:
        """The scores ``[V]`` behind many more tokens, float32; their keys and values join ``held``. Pieces of `PIECE` tokens at once, so that memory
        does not grow with a prompt; near what steps give, as sums go in another order. ``reads_prompts``: whether this is fast, as it is not where
        layers are dense."""
        for first in range(0, len(tokens), PIECE):
            scores = self._read_piece(tokens[first : first + PIECE], held)
        return scores

    def _read_piece(self, tokens: Sequence[int], held: KeysValues) -> Tensor:
        held.make_room(len(tokens))
        with self.lock:
            for module, name, to in self.lookups:
                numbers = tokens if name == "id" else range(held.length, held.length + len(tokens))
                to[: len(tokens)].copy_(module(torch.tensor([*numbers])[:, None])[:, None])
            self.tape.read(Row(held.addresses, held.length, held.capacity), tokens)
            held.length += len(tokens)
            return self.scores[len(tokens) - 1].to(torch.float32, copy=True)

    def step(self, token: int, held: KeysValues) -> Tensor:
        """The scores ``[V]`` behind one more token, float32; its keys and values join ``held``. Raises ValueError where an input that is to be
        rounded is not finite."""
        scores, finite = self._step([token], [held])
        if not finite[0]:
            raise ValueError("x: a row that is to be rounded to integers holds NaN or inf")
        return scores[0]

    def step_rows(self, tokens: Sequence[int], held: Sequence[KeysValues]) -> list[Tensor]:
        """The same for a token each of up to `kernels.FEW_ROWS` sequences, which read the weights once: to the last bit what each gives alone. Scores
        are NaN where an input that is to be rounded is not finite."""
        return self._step(tokens, held)[0]

    def _step(self, tokens: Sequence[int], held: Sequence[KeysValues]) -> tuple[list[Tensor], list[bool]]:
        for one in held:
            one.make_room()
        with self.lock:
            for row, (token, one) in enumerate(zip(tokens, held, strict=True)):
                for module, name, to in self.lookups:
                    to[row].copy_(module(torch.tensor([[token if name == "id" else one.length]])))
            finite = self.tape.run_rows([Row(one.addresses, one.length, one.capacity, token) for token, one in zip(tokens, held, strict=True)])
            for one in held:
                one.length += 1
            scores = [row.to(torch.float32, copy=True) for row in self.scores[: len(held)]]
        return [row if fine else row.fill_(torch.nan) for row, fine in zip(scores, finite, strict=True)], finite


def rows_of(module: nn.Module) -> PackedMatrix | Tensor | None:
    """The table whose rows ``module`` gives as they are; None where there is none."""
    if isinstance(module, QuantEmbedding):
        return module.packed_rows()
    if type(module) is nn.Embedding and module.max_norm is None and module.weight.is_contiguous():
        return module.weight.detach()
    return None


def together(instructions: Sequence[Instruction]) -> list[Group]:
    """Products of a row follow the first of them; every tensor is written once, so nothing that they read changes in between."""
    found: list[Group] = []
    products: dict[int, list[Instruction]] = {}
    for instruction in instructions:
        if not isinstance(instruction, Multiply):
            found.append([instruction])
        elif (at := instruction.x.data_ptr()) in products:
            products[at].append(instruction)
        else:
            products[at] = [instruction]
            found.append(products[at])
    return found


def write_on(tape: Tape, group: Group, read: Callable[[Tensor], Tensor], write: Callable[[Tensor], Tensor]) -> None:
    """``read`` and ``write``: what stands for a recorded tensor that is read, and for one that is written."""
    head = group[0]
    match head:
        case Elementwise(function=function, y=y, a=a, b=b):
            tape.elementwise(function, write(y), read(a), read(b) if isinstance(b, Tensor) else b)
        case Attend():
            tape.attend(head.layer, read(head.q), read(head.k), read(head.v), write(head.y), head.scale)
        case Multiply():
            pairs = [(m.weight, write(m.y).view(-1)) for m in group if isinstance(m, Multiply)]
            tape.multiply(read(head.x).view(-1), pairs)
