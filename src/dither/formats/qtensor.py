"""QTensor: a quantized matrix as it is stored. Every method emits it; it counts every byte.

Stored tensors (`QTensor.tensors`) of a grid; other kinds of storage (`WeightScheme`) say theirs in their own files:

    codes         uint8 [O, stride]     packed rows, see `packing`
    scale         [O, G] in the scale's storage type
    zero_point    uint8 [ceil(O G b / 8)]   one LSB-first stream over the whole grid (integer zero points)
    offset        float16 [O, G]            (float offsets)
    global_scale  float32 []                (schemes whose block scales are e4m3)
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dither.errors import CheckpointError
from dither.formats.format import Params
from dither.formats.packing import pack_rows, pack_stream, unpack_rows
from dither.formats.scales import STORAGE
from dither.formats.scheme import Scheme
from dither.formats.stored import WeightScheme, scheme_from_json


@dataclass(frozen=True)
class QTensor:
    """``stored`` are the tensors above; ``shape`` is the matrix ``(O, I)``."""

    stored: Mapping[str, Tensor]
    scheme: WeightScheme
    shape: tuple[int, int]

    @classmethod
    def from_codes(cls, codes: Tensor, params: Params, scheme: Scheme, shape: tuple[int, ...] | None = None) -> QTensor:
        """Pack ``codes [O, I]`` uint8 and grid-shaped ``params``. ValueError where they do not fit each other."""
        rows, columns = codes.shape if shape is None else (shape[0], int(torch.Size(shape[1:]).numel()))
        codes = codes.reshape(rows, columns)
        grid = scheme.blocks.grid_shape(rows, columns)
        bits = scheme.format.param_bits()
        for key in bits:
            if tuple(params[key].shape) != grid:
                raise ValueError(
                    f"{key}: shape {tuple(params[key].shape)}, but {scheme} on {rows} x {columns} needs {grid}"
                )
        stored = {"codes": pack_rows(codes, scheme.format.bits)}
        for key in bits:
            stored[key] = _store(key, params[key], scheme)
        if "global_scale" in params:
            stored["global_scale"] = params["global_scale"].to(torch.float32).reshape(())
        return cls(stored, scheme, (rows, columns))

    @classmethod
    def empty(cls, scheme: WeightScheme, shape: tuple[int, ...], device: str = "cpu") -> QTensor:
        """A tensor of zeros of the right sizes and types, to be filled (or, on "meta", to be measured)."""
        rows, columns = shape[0], int(torch.Size(shape[1:]).numel())
        made = {k: torch.zeros(s, dtype=d, device=device) for k, (s, d) in scheme.layout(rows, columns).items()}
        return cls(made, scheme, (rows, columns))

    @classmethod
    def trusted(cls, stored: Mapping[str, Tensor], scheme: WeightScheme, shape: tuple[int, ...]) -> QTensor:
        """Stored tensors that were checked before."""
        return cls(stored, scheme, (shape[0], shape[1]))

    @classmethod
    def from_tensors(cls, stored: Mapping[str, Tensor], scheme: WeightScheme, shape: tuple[int, ...]) -> QTensor:
        """Stored tensors from a file: sizes, types and ranges are checked. Raises CheckpointError."""
        rows, columns = shape[0], int(torch.Size(shape[1:]).numel())
        layout = scheme.layout(rows, columns)
        for key, (size, dtype) in layout.items():
            if key not in stored:
                raise CheckpointError(f"{key}: is missing from a quantized tensor of scheme {scheme}")
            if tuple(stored[key].shape) != size or stored[key].dtype != dtype:
                raise CheckpointError(
                    f"{key}: is {stored[key].dtype} {list(stored[key].shape)}, but {scheme} on {rows} x {columns} needs {dtype} {list(size)}"
                )
        extra = set(stored) - set(layout)
        if extra:
            raise CheckpointError(f"{sorted(extra)[0]}: does not belong to a quantized tensor of scheme {scheme}")
        scheme.check_stored(stored, (rows, columns))
        return cls({key: aligned(value) for key, value in stored.items()}, scheme, (rows, columns))

    @property
    def grid(self) -> Scheme:
        """The scheme, where it is a grid. TypeError for other kinds of storage, which have no codes and parameters of their own."""
        if not isinstance(self.scheme, Scheme):
            raise TypeError(f"a tensor stored as {self.scheme} has no grid")
        return self.scheme

    @property
    def codes(self) -> Tensor:
        """uint8 ``[O, I]``."""
        return unpack_rows(self.stored["codes"], self.grid.format.bits, self.shape[1])

    @cached_property
    def params(self) -> Params:
        """Grid-shaped parameters, float32."""
        return self.grid.unpack_params(self.stored, self.shape)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The values ``[O, I]``: computed in float32, then cast."""
        if isinstance(self.scheme, Scheme):
            return self.scheme.decode_packed(self.stored["codes"], self.params, self.shape, dtype)
        return self.scheme.decode_stored(self.stored, self.shape, dtype)

    def rows(self, index: Tensor) -> QTensor:
        """The tensor's rows at ``index [N]``, without decoding the others. ValueError where blocks span rows."""
        if self.grid.blocks.height != 1:
            raise ValueError(f"rows: blocks of {self.scheme} span rows, so single rows cannot be taken out")
        params = {k: v if v.dim() == 0 else v[index] for k, v in self.params.items()}
        stored = {k: _store(k, v, self.grid) if k != "global_scale" else v for k, v in params.items()}
        stored["codes"] = self.stored["codes"][index]
        return QTensor(stored, self.scheme, (index.numel(), self.shape[1]))

    @property
    def nbytes(self) -> int:
        """Bytes on disk, all of them."""
        return sum(t.numel() * t.element_size() for t in self.stored.values())

    @property
    def bits(self) -> float:
        """True bits a weight."""
        count = self.shape[0] * self.shape[1]
        return 8 * self.nbytes / count if count else 0.0

    def tensors(self) -> dict[str, Tensor]:
        """Exactly what goes to disk."""
        return dict(self.stored)

    def save(self, path: str | Path) -> None:
        """One safetensors file with the scheme in its metadata."""
        about = json.dumps({"scheme": self.scheme.to_json(), "shape": list(self.shape)})
        save_file(
            {k: v.contiguous() for k, v in self.stored.items()}, path, metadata={"format": "pt", "qtensor": about}
        )

    @classmethod
    def load(cls, path: str | Path) -> QTensor:
        """The inverse of `save`. Raises CheckpointError for a missing or damaged file."""
        try:
            with safe_open(path, "pt") as file:
                about: dict[str, Any] = json.loads((file.metadata() or {})["qtensor"])
                stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            shape = about["shape"]
            if not isinstance(shape, list) or len(shape) != 2 or not all(type(n) is int and 0 <= n < 1 << 63 for n in shape):
                raise ValueError(f"shape: {str(shape)[:60]} is that of no matrix")
            return cls.from_tensors(stored, scheme_from_json(about["scheme"]), tuple(shape))
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{path}: holds no readable quantized tensor ({error})") from None


def aligned(tensor: Tensor) -> Tensor:
    """The tensor in memory that starts at a multiple of its numbers' size, as kernels read it. A file may place it anywhere; loaders map files."""
    return tensor.clone() if tensor.data_ptr() % tensor.element_size() else tensor


def _store(key: str, value: Tensor, scheme: Scheme) -> Tensor:
    """A parameter in its storage type."""
    if key == "zero_point":
        return pack_stream(value.to(torch.uint8).reshape(-1), scheme.format.bits)
    if key == "offset":
        return value.to(torch.float16)
    return value.to(torch.float32).to(STORAGE[scheme.format.scale])  # type: ignore[attr-defined]
