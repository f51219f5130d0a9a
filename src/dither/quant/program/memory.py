"""Where the tensors of a program lie: one buffer, whose places are used again once nothing reads what is there, so that what a step touches beside
the weights stays in the processor's caches. Of several rows that are stepped at once, each has such a buffer.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dither.kernels.tape import ELEMENTS
from dither.quant.program.instructions import Instruction, Record, Unrecordable, reads, storage

Group = Sequence[Instruction]
_LINE = 64  # bytes


class Memory:
    """``memory(x)``: the tensor that stands for a recorded one. ``buffer [rows, bytes]``; a row that is never run takes no memory, only
    addresses."""

    def __init__(self, found: Record, instructions: Sequence[Group], rows: int = 1) -> None:
        first: dict[int, int] = {}
        last: dict[int, int] = {}
        sizes: dict[int, int] = {}

        def seen(x: Tensor, at: int, *, written: bool = False) -> None:
            key = storage(x)
            if written and key not in first:
                first[key], sizes[key] = at, x.untyped_storage().nbytes() // x.element_size() * element(x).itemsize
            if key in first:
                last[key] = at

        for x in (found.place, *(y for _, _, y in found.lookups)):
            seen(x, -1, written=True)
        for at, group in enumerate(instructions):
            for instruction in group:
                seen(instruction.y, at, written=True)
                for x in reads(instruction):
                    seen(x, at)
        seen(found.logits, len(instructions))
        self.places, size = placed(first, last, sizes)
        each = (size // _LINE | 1) * _LINE  # an odd number of lines, so that rows do not meet in the same ones of the caches
        whole = torch.empty(rows * each + _LINE, dtype=torch.uint8)
        start = -whole.data_ptr() % _LINE
        self.buffer = whole[start : start + rows * each].view(rows, each)
        self.sizes = sizes

    def __call__(self, x: Tensor) -> Tensor:
        return self.rows(x)[0] if storage(x) in self.places else x if x.dtype in ELEMENTS else x.float()

    def rows(self, x: Tensor) -> Tensor:
        """Those of all rows, ``[rows, *x.shape]``."""
        key = storage(x)
        own = self.buffer[:, self.places[key] : self.places[key] + self.sizes[key]].view(element(x))
        return own.as_strided((own.shape[0], *x.shape), (own.stride(0), *x.stride()), own.storage_offset() + x.storage_offset())


def element(x: Tensor) -> torch.dtype:
    """What a recorded tensor is stored as. Integers are places of tokens."""
    if x.dtype in ELEMENTS:
        return x.dtype
    if x.is_floating_point():
        raise Unrecordable(f"numbers of {x.dtype}")
    return torch.float32


def placed(first: dict[int, int], last: dict[int, int], sizes: dict[int, int]) -> tuple[dict[int, int], int]:
    """An offset for each tensor, so that none that are needed at the same time overlap; and the bytes in all. Greedy: the lowest gap that fits."""
    places: dict[int, int] = {}
    busy: list[tuple[int, int, int]] = []  # offset, end, last
    most = 0
    for key in sorted(first, key=first.__getitem__):
        busy = sorted(b for b in busy if b[2] >= first[key])
        at, size = 0, -(-sizes[key] // _LINE) * _LINE
        for start, end, _ in busy:
            if start - at >= size:
                break
            at = max(at, end)
        places[key] = at
        busy.append((at, at + size, last[key]))
        most = max(most, at + size)
    return places, most
