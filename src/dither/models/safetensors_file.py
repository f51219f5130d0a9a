"""Safetensors files, checked before they are believed and read one tensor at a time.

A file is ``u64 length | JSON header | data``; the header gives each tensor's dtype, shape and ``data_offsets``.
Everything the header claims is checked against the file's size first (see `read_header`), so that a damaged file costs
one line, never memory. A tensor is read in pieces straight into its place: memory is the tensor itself plus one piece,
and no mapping outlives the read.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dither.errors import CheckpointError

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
MAX_HEADER = 100_000_000  # bytes; the limit of the format's own reader
_PIECE = 1 << 22  # bytes read at a time
_REDO = "the file is damaged or incomplete: copy or download it again"

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
if hasattr(torch, "float8_e8m0fnu"):
    DTYPES["F8_E8M0"] = torch.float8_e8m0fnu


@dataclass(frozen=True)
class Entry:
    """One tensor of one file: ``offset`` and ``nbytes`` count bytes of the file."""

    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def read_header(path: Path) -> dict[str, Entry]:
    """The tensors of one file by name, in file order. Raises CheckpointError unless the header is whole and true of
    this file: known dtypes, sizes equal to shape x dtype, and data that fills the rest of the file without a gap or an
    overlap."""
    header, start, size = _json_header(path)
    found: dict[str, Entry] = {}
    for name, value in header.items():
        if name != "__metadata__":
            found[name] = _entry(path, name, value, start, size)
        elif not isinstance(value, dict) or not all(isinstance(v, str) for v in value.values()):
            raise CheckpointError(f"{path}: __metadata__ is not a map of strings; {_REDO}")
    end = start
    for name, entry in sorted(found.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if entry.offset != end:
            what = "overlaps the tensor before it" if entry.offset < end else "leaves a gap before it"
            raise CheckpointError(
                f"{path}: tensor {name} {what} (starts at byte {entry.offset}, expected {end}); {_REDO}"
            )
        end += entry.nbytes
    if end != size:
        raise CheckpointError(f"{path}: tensors end at byte {end}, but the file has {size}; {_REDO}")
    return found


def _json_header(path: Path) -> tuple[dict[str, Any], int, int]:
    """``(header, byte where the data starts, size of the file)``."""
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            prefix = file.read(8)
            length = int.from_bytes(prefix, "little")
            if len(prefix) < 8 or length > min(size - 8, MAX_HEADER):
                claims = f"its header claims {length} bytes, " if len(prefix) == 8 else ""
                raise CheckpointError(f"{path}: is no whole safetensors file ({claims}the file has {size}); {_REDO}")
            raw = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from None
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: the header is not valid JSON ({_short(error)}); {_REDO}") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: the header is no JSON object; {_REDO}")
    return header, 8 + length, size


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name occurs twice")
    return found


def _short(error: BaseException) -> str:
    text = str(error).replace("\n", " ")
    return text if len(text) <= 120 else text[:117] + "..."


def _entry(path: Path, name: str, value: Any, start: int, size: int) -> Entry:
    where = f"{path}: tensor {name}"
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{where}: has no dtype, shape and data_offsets; {_REDO}")
    dtype = DTYPES.get(value["dtype"]) if isinstance(value["dtype"], str) else None
    if dtype is None:
        raise CheckpointError(
            f"{where}: has the unknown dtype {_short_value(value['dtype'])}; {_REDO}, or update dither"
        )
    shape, offsets = value["shape"], value["data_offsets"]
    if not (_naturals(shape) and len(shape) <= 32):
        raise CheckpointError(f"{where}: has the impossible shape {_short_value(shape)}; {_REDO}")
    if not (_naturals(offsets) and len(offsets) == 2):
        raise CheckpointError(f"{where}: has the impossible data_offsets {_short_value(offsets)}; {_REDO}")
    begin, end = offsets
    if not begin <= end <= size - start:
        raise CheckpointError(f"{where}: lies at bytes {begin} to {end} of {size - start} bytes of data; {_REDO}")
    if end - begin != math.prod(shape) * dtype.itemsize:
        expected = math.prod(shape) * dtype.itemsize
        raise CheckpointError(
            f"{where}: has {end - begin} bytes, but shape {shape} of {value['dtype']} takes {expected}; {_REDO}"
        )
    return Entry(path, dtype, tuple(shape), start + begin, end - begin)


def _naturals(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 1 << 63 for n in value)


def _short_value(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def read_folder(folder: Path) -> dict[str, Entry]:
    """The tensors of a checkpoint folder, single file or sharded. Raises CheckpointError (damaged, incomplete)."""
    if (folder / WEIGHTS).is_file():
        return read_header(folder / WEIGHTS)
    index = folder / INDEX
    if index.is_file():
        weight_map = _weight_map(index)
        return _sharded(index, weight_map)
    loose = sorted(folder.glob("*.safetensors"))
    if len(loose) == 1:
        return read_header(loose[0])
    raise CheckpointError(
        f"{folder}: has neither {WEIGHTS} nor {INDEX}; {'copy the index too' if loose else 'copy the weights too'}"
    )


def _weight_map(index: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(
            f"{index}: is no index of shards ({type(error).__name__}: {_short(error)}); {_REDO}"
        ) from None
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise CheckpointError(f"{index}: weight_map is no map from tensors to files; {_REDO}")
    return weight_map


def _sharded(index: Path, weight_map: dict[str, str]) -> dict[str, Entry]:
    found: dict[str, Entry] = {}
    for shard in sorted(set(weight_map.values())):
        path = index.parent / shard
        if Path(shard).name != shard:
            raise CheckpointError(
                f"{index}: names the file {_short_value(shard)}, which is outside the folder; {_REDO}"
            )
        if not path.is_file():
            raise CheckpointError(f"{index}: names {shard}, which is not in the folder; copy or download it too")
        entries = read_header(path)
        promised = {name for name, file in weight_map.items() if file == shard}
        if not promised <= set(entries):
            raise CheckpointError(
                f"{path}: lacks the tensor {min(promised - set(entries))}, which {index.name} promises; {_REDO}"
            )
        found |= {name: entry for name, entry in entries.items() if name in promised}
    return found


def read_tensor(entry: Entry, name: str, dtype: torch.dtype | None = None) -> Tensor:
    """One tensor in memory of its own, converted to ``dtype`` piece by piece (None: as stored)."""
    target = torch.empty(entry.shape, dtype=dtype or entry.dtype)
    flat = target.reshape(-1)
    count = max(1, _PIECE // entry.dtype.itemsize)
    piece = torch.empty(min(count, flat.numel()), dtype=entry.dtype)
    try:
        handle = os.open(entry.path, os.O_RDONLY)
    except OSError as error:
        raise CheckpointError(f"{entry.path}: cannot be read ({error.strerror or error})") from None
    try:
        for begin in range(0, flat.numel(), count):
            part = piece[: min(count, flat.numel() - begin)]
            _read_into(handle, part, entry.offset + begin * entry.dtype.itemsize, entry.path, name)
            flat[begin : begin + part.numel()] = part
    finally:
        os.close(handle)
    return target


def same_bytes(a: Entry, b: Entry) -> bool:
    """Whether two stored tensors are equal, compared piece by piece."""
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    with open(a.path, "rb") as file_a, open(b.path, "rb") as file_b:
        file_a.seek(a.offset)
        file_b.seek(b.offset)
        left = a.nbytes
        while left > 0:
            count = min(left, _PIECE)
            if file_a.read(count) != file_b.read(count):
                return False
            left -= count
    return True


def _read_into(handle: int, part: Tensor, offset: int, path: Path, name: str) -> None:
    view = memoryview(part.view(torch.uint8).numpy())  # type: ignore[arg-type]  # numpy arrays are buffers
    done = 0
    while done < len(view):
        got = os.preadv(handle, [view[done:]], offset + done)
        if got == 0:
            raise CheckpointError(f"{path}: ends inside tensor {name}, it was cut while in use; {_REDO}")
        done += got
