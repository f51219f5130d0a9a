"""Scheme = Format + Blocks + clipping search + static or dynamic: all that turns a matrix into codes and back.

scheme = Int(4) @ group(64)
params = scheme.fit(weight)              # each [O, G]
codes = scheme.encode(weight, params)    # uint8 [O, I]
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dither.formats.blocks import Blocks, Piece, group
from dither.formats.clip import Clip, clip_search
from dither.formats.floating import Float
from dither.formats.format import Format, Params
from dither.formats.integer import Int
from dither.formats.packing import row_stride

FORMATS: dict[str, type[Format]] = {"int": Int, "float": Float}


@dataclass(frozen=True)
class Scheme:
    """How matrices become few-bit. ``clip``: search each block's range (None: min-max). ``dynamic``: parameters are made anew for each
    tensor at run time (activations) rather than stored."""

    format: Format
    blocks: Blocks
    clip: Clip | None = None
    dynamic: bool = False

    def fit(
        self, w: Tensor, *, gram: Tensor | None = None, weight: Tensor | None = None, clip: Clip | None = None
    ) -> Params:
        """Parameters for ``w [O, I]``, each of shape ``blocks.grid_shape(O, I)``, float32 (float64 for float64 input).

        ``clip``: a search instead of the scheme's own; it weighs errors by ``weight [I]`` or by ``gram [G, n, n]``, one Gram matrix a
        full group (ragged groups then go by its diagonal ``weight``, or unweighted). Raises ValueError (not 2-D, not finite).
        """
        check_matrix(w)
        search = clip or self.clip
        shared = self.format.shared(w)
        out: Params = dict(shared)
        shape = self.blocks.grid_shape(*w.shape)
        for piece in self.blocks.pieces(*w.shape):
            x = piece.blocked(w)
            if search is None or x.shape[-1] == 0:
                found = self.format.fit(x, shared)
            else:
                full = gram is not None and piece.block == (1, gram.shape[-1]) and x.shape[-2] == gram.shape[0]
                by_input = (
                    None
                    if weight is None or full
                    else piece.blocked(weight.expand(w.shape[0] if piece.block[0] > 1 else 1, -1))
                )
                found = clip_search(x, self.format, search, weight=by_input, gram=gram if full else None, shared=shared)
            for key, value in found.items():
                if value.dim():
                    out.setdefault(key, value.new_zeros(shape))[piece.grid_rows, piece.grid_columns] = value
        for key in self.format.param_bits():
            out.setdefault(key, w.new_zeros(shape))
        return out

    def encode(self, w: Tensor, params: Params) -> Tensor:
        """Nearest codes, uint8 ``[O, I]``."""
        return self._map(w, params, self.format.encode, torch.uint8)

    def decode(self, codes: Tensor, params: Params) -> Tensor:
        """Values ``[O, I]`` in the type of the parameters."""
        return self._map(codes, params, self.format.decode, params["scale"].dtype)

    def quantize(self, w: Tensor, params: Params | None = None) -> Tensor:
        """``decode(encode(w))``; fits first where no ``params`` are given."""
        return self._map(w, self.fit(w) if params is None else params, self.format.quantize, w.dtype)

    def _map(self, matrix: Tensor, params: Params, function: Any, dtype: torch.dtype) -> Tensor:
        pieces = list(self.blocks.pieces(*matrix.shape))
        if len(pieces) == 1:
            return self._one(matrix, params, function, pieces[0]).to(dtype)
        out = torch.empty(matrix.shape, dtype=dtype, device=matrix.device)
        for piece in pieces:
            out[piece.rows, piece.columns] = self._one(matrix, params, function, piece).to(dtype)
        return out

    @staticmethod
    def _one(matrix: Tensor, params: Params, function: Any, piece: Piece) -> Tensor:
        result: Tensor = piece.unblocked(function(piece.blocked(matrix), piece.of(params)))
        return result

    def column_groups(self, inputs: int) -> Tensor:
        """``[I]`` int64: the grid column of each input."""
        return self.blocks.column_groups(inputs)

    def is_ragged(self, inputs: int, outputs: int = 1) -> bool:
        """Whether the last group of a row is shorter than the others."""
        return self.blocks.kind == "group" and self.blocks.ragged(outputs, inputs)

    def nbytes(self, outputs: int, inputs: int) -> int:
        """Bytes that a matrix ``[O, I]`` takes: packed rows and every parameter."""
        total = outputs * row_stride(inputs, self.format.bits)
        rows, columns = self.blocks.grid_shape(outputs, inputs)
        total += sum(-(-rows * columns * bits // 8) for bits in self.format.param_bits().values())
        return total + (4 if getattr(self.format, "scale", "") == "e4m3" else 0)

    def bits_per_weight(self, outputs: int, inputs: int) -> float:
        """True bits a weight: all stored bytes over all weights."""
        return 8 * self.nbytes(outputs, inputs) / (outputs * inputs) if outputs * inputs else 0.0

    def with_clip(self, clip: Clip | None) -> Scheme:
        return replace(self, clip=clip)

    def to_json(self) -> dict[str, Any]:
        found: dict[str, Any] = {"format": self.format.to_json(), "blocks": self.blocks.to_json()}
        if self.clip is not None:
            found["clip"] = self.clip.to_json()
        if self.dynamic:
            found["dynamic"] = True
        return found

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Scheme:
        """The inverse of `to_json`. Raises ValueError that names the field."""
        if not isinstance(data, dict):
            raise ValueError(f"scheme: must be a mapping, not {type(data).__name__}")
        unknown = set(data) - {"format", "blocks", "clip", "dynamic"}
        if unknown or "format" not in data or "blocks" not in data:
            raise ValueError(
                f"scheme: has fields {sorted(data)}; it needs format and blocks, and may have clip and dynamic"
            )
        entry = dict(_mapping(data["format"], "format"))
        kind = entry.pop("kind", None)
        if kind not in FORMATS:
            raise ValueError(f"format.kind: must be one of {', '.join(FORMATS)}, not {kind!r}")
        fmt = _build(FORMATS[kind], entry, "format")
        blocks = _build(Blocks, dict(_mapping(data["blocks"], "blocks")), "blocks")
        clip = _build(Clip, dict(_mapping(data["clip"], "clip")), "clip") if data.get("clip") is not None else None
        return cls(fmt, blocks, clip, bool(data.get("dynamic", False)))

    def __str__(self) -> str:
        return f"{self.format} {self.blocks}" + (" dynamic" if self.dynamic else "")


def _mapping(value: Any, field: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{field}: must be a mapping, not {type(value).__name__}")
    return value


def _build(kind: Any, values: dict[str, Any], field: str) -> Any:
    try:
        return kind(**values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{field}: {error}") from None


def check_matrix(w: Tensor, name: str = "weight") -> None:
    """Raises ValueError unless ``w`` is a finite floating matrix."""
    if w.dim() != 2 or not w.is_floating_point():
        raise ValueError(f"{name}: must be a floating matrix [O, I], not {w.dtype} of shape {tuple(w.shape)}")
    if w.numel() == 0:
        return
    low, high = w.aminmax()  # NaN propagates into both; much faster than isfinite
    if not bool(torch.isfinite(low) & torch.isfinite(high)):
        row, column = (int(i) for i in (~torch.isfinite(w)).nonzero()[0])
        raise ValueError(f"{name}: holds {float(w[row, column])} at row {row}, column {column}")


MXFP4 = Float(2, 1, scale="e8m0") @ group(32)
"""OCP Microscaling: e2m1 values, a power of two for every 32."""
NVFP4 = Float(2, 1, scale="e4m3") @ group(16)
"""e2m1 values, an e4m3 scale for every 16, one float32 scale a tensor."""
