"""The structure of a GGUF file, checked before anything believes it.

    magic "GGUF" | u32 version | u64 tensors | u64 pairs | pairs | tensor infos | padding | data

Every count and length is compared with the bytes that are left before it is used, so reading a lying file costs no more
than reading the file. What passes here is safe to hand to code that allocates what the file asks for. Format: the GGUF
specification of ggml, versions 2, 3.
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dither.errors import CheckpointError

_REDO = "the file is damaged or incomplete: copy or download it again"
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "B", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MAX_KEY, _MAX_DIMS, _MAX_DEPTH = 65535, 4, 4  # of the specification, but for the depth of arrays in arrays
_MAX_ELEMENTS = (
    1 << 24
)  # of all arrays together: readers spend hundreds of bytes on each; the largest vocabularies have 2**20
_MAX_FIELDS, _MAX_TENSORS = 1 << 16, 1 << 20


@dataclass(frozen=True)
class Tensor:
    """``shape`` in PyTorch's order (slowest first); ``kind`` the ggml type's number; ``offset`` from the start of the
    file."""

    shape: tuple[int, ...]
    kind: int
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Layout:
    """``scalars``: metadata but arrays. ``header_bytes``: everything before the data."""

    path: Path
    scalars: dict[str, Any]
    tensors: dict[str, Tensor]
    header_bytes: int
    size: int


def read_layout(path: Path) -> Layout:
    """Check a GGUF file and say where its tensors lie. Raises CheckpointError naming the file, the place, and the
    lie."""
    try:
        size = path.stat().st_size
        if size < 24:
            raise CheckpointError(f"{path}: has {size} bytes, too few for a GGUF file; {_REDO}")
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Reader(path, data, size).layout()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from None


class _Reader:
    def __init__(self, path: Path, data: mmap.mmap, size: int) -> None:
        self.path, self.data, self.size = path, data, size
        self.at, self.elements = 0, 0

    def fail(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {what}; {_REDO}")

    def take(self, form: str, what: str) -> Any:
        width = struct.calcsize("<" + form)
        if self.size - self.at < width:
            raise self.fail(f"ends inside {what}")
        (value,) = struct.unpack_from("<" + form, self.data, self.at)
        self.at += width
        return value

    def string(self, what: str, limit: int | None = None) -> str:
        length = self.take("Q", what)
        if length > self.size - self.at:
            raise self.fail(f"{what} claims {length} bytes, {self.size - self.at} are left")
        if limit is not None and not 0 < length <= limit:
            raise self.fail(f"{what} is {length} bytes long")
        raw = self.data[self.at : self.at + length]
        self.at += length
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            raise self.fail(f"{what} is not UTF-8") from None

    def layout(self) -> Layout:
        if self.data[:4] != b"GGUF":
            raise CheckpointError(f"{self.path}: is no GGUF file (it starts with {self.data[:4]!r}); check the name")
        self.at = 4
        version = self.take("I", "the version")
        if version not in (2, 3):
            swapped = version & 0xFFFF == 0 and version != 0
            raise CheckpointError(
                f"{self.path}: "
                + (
                    "is a big-endian GGUF file; convert it to little-endian first"
                    if swapped
                    else f"is GGUF version {version}; versions 2 and 3 can be read"
                )
            )
        tensors, fields = self.take("Q", "the counts"), self.take("Q", "the counts")
        left = self.size - self.at
        if fields > min(_MAX_FIELDS, left // 13):  # key length, one byte of key at least, type
            raise self.fail(f"claims {fields} metadata fields in {left} bytes")
        if tensors > min(_MAX_TENSORS, left // 33):
            raise self.fail(f"claims {tensors} tensors in {left} bytes")
        scalars = self.metadata(fields)
        infos = [self.info(i) for i in range(tensors)]
        alignment = scalars.get("general.alignment", 32)
        if not (type(alignment) is int and 0 < alignment <= 1 << 16 and alignment & (alignment - 1) == 0):
            raise self.fail(f"general.alignment is {alignment!r}, not a power of two")
        start = -(-self.at // alignment) * alignment
        return Layout(self.path, scalars, self.place(infos, start, alignment), self.at, self.size)

    def metadata(self, count: int) -> dict[str, Any]:
        found: dict[str, Any] = {}
        seen: set[str] = set()
        for i in range(count):
            key = self.string(f"the name of metadata field {i}", _MAX_KEY)
            if key in seen:
                raise self.fail(f"metadata field {key} occurs twice")
            seen.add(key)
            kind = self.take("I", f"metadata field {key}")
            value = self.value(kind, f"metadata field {key}", 0)
            if kind != _ARRAY:
                found[key] = value
        architecture = found.get("general.architecture")
        if not isinstance(architecture, str):
            raise self.fail("metadata field general.architecture is missing")
        return found

    def value(self, kind: int, what: str, depth: int) -> Any:
        if kind in _SCALARS:
            return self.take(_SCALARS[kind], what)
        if kind == _STRING:
            return self.string(what)
        if kind != _ARRAY or depth >= _MAX_DEPTH:
            raise self.fail(f"{what} is of the unknown type {kind}")
        inner, count = self.take("I", what), self.take("Q", what)
        width = struct.calcsize("<" + _SCALARS[inner]) if inner in _SCALARS else 8 if inner == _STRING else 12
        left = self.size - self.at
        self.elements += count
        if count > left // width or self.elements > _MAX_ELEMENTS:
            raise self.fail(f"{what} claims {count} elements in {left} bytes")
        if inner in _SCALARS:
            self.at += count * width
            return None
        for _ in range(count):
            self.value(inner, what, depth + 1)
        return None

    def info(self, i: int) -> tuple[str, tuple[int, ...], int, int]:
        name = self.string(f"the name of tensor {i}", 1024)
        dims = self.take("I", f"tensor {name}")
        if not 0 < dims <= _MAX_DIMS:
            raise self.fail(f"tensor {name} claims {dims} dimensions")
        shape = tuple(self.take("Q", f"tensor {name}") for _ in range(dims))[::-1]
        return name, shape, self.take("I", f"tensor {name}"), self.take("Q", f"tensor {name}")

    def place(
        self, infos: list[tuple[str, tuple[int, ...], int, int]], start: int, alignment: int
    ) -> dict[str, Tensor]:
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

        sizes = {int(kind): GGML_QUANT_SIZES[kind] for kind in GGMLQuantizationType if kind in GGML_QUANT_SIZES}
        found: dict[str, Tensor] = {}
        for name, shape, kind, offset in infos:
            if name in found:
                raise self.fail(f"tensor {name} occurs twice")
            if kind not in sizes:
                raise self.fail(f"tensor {name} is of the unknown type {kind}")
            block, width = sizes[kind]
            if 0 in shape or shape[-1] % block:
                raise self.fail(f"tensor {name} has the impossible shape {list(shape)} (blocks of {block})")
            nbytes = math.prod(shape) // block * width
            if offset % alignment or start + offset + nbytes > self.size:
                raise self.fail(f"tensor {name} claims {nbytes} bytes at {start + offset} of {self.size}")
            found[name] = Tensor(shape, kind, start + offset, nbytes)
        end = start
        for name, tensor in sorted(found.items(), key=lambda item: item[1].offset):
            if tensor.offset < end:
                raise self.fail(f"tensor {name} overlaps the one before it")
            end = tensor.offset + tensor.nbytes
        return found
