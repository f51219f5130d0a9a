"""Scheme = Format + Blocks + clipping search + static or dynamic: all that turns a matrix into codes and back.

scheme = Int(4) @ group(64)
params = scheme.fit(weight)              # each [O, G]
codes = scheme.encode(weight, params)    # uint8 [O, I]
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from dither import kernels
from dither.errors import CheckpointError
from dither.formats.blocks import Blocks, Piece, group
from dither.formats.clip import Clip, clip_search
from dither.formats.floating import Float
from dither.formats.format import Format, Params
from dither.formats.integer import Int
from dither.formats.logarithm import Log
from dither.formats.packing import row_stride, unpack_rows, unpack_stream
from dither.formats.scales import STORAGE
from dither.formats.stored import KINDS, Layout, WeightScheme
from dither.kernels import round_affine, round_to_one_grid
from dither.kernels.checks import check_finite
from dither.kernels.round import SCALE_TYPES

FORMATS: dict[str, type[Format]] = {"int": Int, "float": Float, "log": Log}


@dataclass(frozen=True)
class Scheme(WeightScheme):
    """How matrices become few-bit. ``clip``: search each block's range (None: min-max). ``dynamic``: parameters are made anew for each
    tensor at run time (activations) rather than stored."""

    kind: ClassVar[str] = "grid"

    format: Format
    blocks: Blocks
    clip: Clip | None = None
    dynamic: bool = False

    def fit(
        self, w: Tensor, *, gram: Sequence[Tensor] = (), weight: Tensor | None = None, clip: Clip | None = None
    ) -> Params:
        """Parameters for ``w [O, I]``, each of shape ``blocks.grid_shape(O, I)``, float32 (float64 for float64 input).

        ``clip``: a search instead of the scheme's own; it weighs errors by ``gram``, Gram matrices ``[G, n, n]`` of groups of one row (full ones,
        and ``[1, r, r]`` of a shorter last one), and where none fits by ``weight [I]``. Raises ValueError (not 2-D, not finite).
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
                own = next((g for g in gram if piece.block == (1, g.shape[-1]) and x.shape[-2] == g.shape[0]), None)
                by_input = None
                if weight is not None and own is None:
                    by_input = piece.blocked(weight.expand(w.shape[0] if piece.block[0] > 1 else 1, -1))
                found = clip_search(x, self.format, search, weight=by_input, gram=own, shared=shared)
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
        if params is None and self.fits_in_one_pass(w):
            scale = STORAGE[self.format.scale]  # type: ignore[attr-defined]
            return round_affine(w.contiguous(), self.format.bits, self.blocks.columns(w.shape[1]), scale)
        if params is not None and self._one_grid(w, params):
            return round_to_one_grid(w.contiguous(), self.format.bits, float(params["scale"]), float(params["zero_point"]))
        return self._map(w, self.fit(w) if params is None else params, self.format.quantize, w.dtype)

    def _one_grid(self, w: Tensor, params: Params) -> bool:
        """Whether a kernel rounds ``w`` to ``params`` in one pass, to the same bits."""
        form, zero, scale = self.format, params.get("zero_point"), params["scale"]
        plain = isinstance(form, Int) and form.sym is False and form.zero == "int" and "global_scale" not in params
        if not plain or self.blocks.kind != "tensor" or zero is None or scale.dtype != torch.float32:
            return False
        if torch.is_grad_enabled() and (w.requires_grad or scale.requires_grad or zero.requires_grad):
            return False
        return w.dim() == 2 and w.numel() > 0 and w.dtype == torch.float32 and w.device.type == "cpu" and w.layout == torch.strided

    def fits_in_one_pass(self, w: Tensor) -> bool:
        """Whether a kernel fits and rounds ``w`` at once, to the same bits and with the same errors."""
        form = self.format
        if not isinstance(form, Int) or form.sym is not False or form.zero != "int" or STORAGE[form.scale] not in SCALE_TYPES:
            return False
        if self.clip is not None or self.blocks.height != 1 or (w.requires_grad and torch.is_grad_enabled()):
            return False
        return w.dim() == 2 and w.dtype == torch.float32 and w.device.type == "cpu" and w.layout == torch.strided

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

    @property
    def tensor_scale(self) -> bool:
        """Whether the whole tensor has a scale beside those of the blocks."""
        return getattr(self.format, "scale", "") == "e4m3"

    def is_ragged(self, inputs: int, outputs: int = 1) -> bool:
        """Whether the last group of a row is shorter than the others."""
        return self.blocks.kind == "group" and self.blocks.ragged(outputs, inputs)

    def layout(self, rows: int, columns: int) -> Layout:
        grid = self.blocks.grid_shape(rows, columns)
        found: Layout = {"codes": ((rows, row_stride(columns, self.format.bits)), torch.uint8)}
        for key, bits in self.format.param_bits().items():
            if key == "zero_point":
                found[key] = ((-(-grid[0] * grid[1] * bits // 8),), torch.uint8)
            else:
                found[key] = (grid, torch.float16 if key == "offset" else STORAGE[self.format.scale])  # type: ignore[attr-defined]
        if self.tensor_scale:
            found["global_scale"] = ((), torch.float32)
        return found

    def check_stored(self, stored: Mapping[str, Tensor], shape: tuple[int, int]) -> None:
        super().check_stored(stored, shape)
        highest, bits = self.format.highest_code, self.format.bits
        if highest < (1 << bits) - 1 and shape[0] * shape[1]:
            found = int(unpack_rows(stored["codes"], bits, shape[1]).max())
            if found > highest:
                raise CheckpointError(f"codes: hold {found}, but the codes of {self.format} are 0 to {highest}")

    def unpack_params(self, stored: Mapping[str, Tensor], shape: tuple[int, int]) -> Params:
        """Grid-shaped parameters, float32, of stored tensors."""
        rows, columns = self.blocks.grid_shape(*shape)
        found: Params = {}
        for key, value in stored.items():
            if key == "codes":
                continue
            if key == "zero_point":
                value = unpack_stream(value, self.format.bits, rows * columns).view(rows, columns)
            found[key] = value.to(torch.float32)
        return found

    def decode_stored(self, stored: Mapping[str, Tensor], shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        return self.decode_packed(stored["codes"], self.unpack_params(stored, shape), shape, dtype)

    def decode_packed(self, packed: Tensor, params: Params, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """``packed`` codes on unpacked ``params`` -> values ``[O, I]``, by the kernel where one fits."""
        columns, bits = shape[1], self.format.bits
        if self.blocks.height == 1 and packed.device.type == "cpu" and dtype in (torch.float32, torch.bfloat16) and columns:
            size = self.blocks.columns(columns)
            if isinstance(self.format, Float):
                scale = self.format.effective(params)
                return kernels.dequantize_affine(packed, bits, scale, torch.zeros_like(scale), size, columns, dtype, self.format.table())
            grid = self.format.column_grid(params)
            if isinstance(grid, kernels.AffineGrid):
                return kernels.dequantize_affine(packed, bits, grid.scale, grid.zero, size, columns, dtype)
        return self.decode(unpack_rows(packed, bits, columns), params).to(dtype)

    def nbytes(self, outputs: int, inputs: int) -> int:
        """Bytes that a matrix ``[O, I]`` takes: packed rows and every parameter."""
        total = outputs * row_stride(inputs, self.format.bits)
        rows, columns = self.blocks.grid_shape(outputs, inputs)
        total += sum(-(-rows * columns * bits // 8) for bits in self.format.param_bits().values())
        return total + (4 if self.tensor_scale else 0)

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


KINDS["grid"] = Scheme


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
    check_finite(name, w)


MXFP4 = Float(2, 1, scale="e8m0") @ group(32)
"""OCP Microscaling: e2m1 values, a power of two for every 32."""
NVFP4 = Float(2, 1, scale="e4m3") @ group(16)
"""e2m1 values, an e4m3 scale for every 16, one float32 scale a tensor."""
