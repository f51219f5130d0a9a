"""Codebooks of vectors: v consecutive weights of one input (v rows of one column) are one index into k centroids.

Liu et al., VPTQ, EMNLP 2024, arXiv 2409.17066; its file format, except that indices stand in the natural order of the columns, so no permutation
is stored or undone at run time.

    W_hat[r v .. r v + v - 1, j] = C_g[a_rj] (+ R_g[b_rj])          g the group of column j, each group with its own books

Stored tensors of a matrix ``[M, N]``; n of its columns are outliers, which have a book (v0, k0) of their own:

    codes              uint8 [ceil(M / v), stride]    a stream a row of vectors, over the other N - n columns: a + k b in log2 k + log2 k2 bits
    centroids          float16 [G, k, v]
    residuals          float16 [G, k2, v]             with residual books
    groups             uint8 [ceil((N - n) t / 8)]    G > 1: the group of each of those columns, a stream of t = ceil(log2 G) bits
    outlier_columns    int16 [n] (int32 above 65536 columns)    rising; int16 holds the bits of an unsigned number
    outlier_codes      uint8 [ceil(M / v0), stride]
    outlier_centroids  float16 [k0, v0]
    column_scale, column_bias    float16 [N]          with ``norm``: the decoded column is multiplied, then shifted

Rows past M of the last vectors are dropped. All of it counts as bits: a book of v = 4, k = 256 costs 16384 bits a matrix.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor

from dither import kernels
from dither.errors import CheckpointError
from dither.formats.packing import pack_stream, unpack_stream
from dither.formats.stored import KINDS, Layout, WeightScheme

WIDEST = 24  # bits of one index


@dataclass(frozen=True)
class Codebook(WeightScheme):
    """``vector``: v; ``centroids``: k; ``residual``: k2 centroids of a second book whose entry is added (None: no second book); ``groups``: G.

    ``outlier_percent`` of the columns have a book of their own, ``outlier = (v0, k0)``; ``norm``: a scale and a bias for each column.
    k, k2 and k0 are powers of two. Raises ValueError for values out of range.
    """

    kind: ClassVar[str] = "codebook"

    vector: int = 4
    centroids: int = 256
    residual: int | None = None
    groups: int = 1
    outlier_percent: float = 0.0
    outlier: tuple[int, int] = (4, 4096)
    norm: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "outlier", tuple(self.outlier))
        _whole("vector", self.vector, 1, 256)
        _power("centroids", self.centroids)
        if self.residual is not None:
            _power("residual", self.residual)
            if self.index_bits > WIDEST:
                raise ValueError(f"residual: an index of {self.index_bits} bits is wider than {WIDEST}")
        _whole("groups", self.groups, 1, 256)
        if isinstance(self.outlier_percent, bool) or not 0 <= self.outlier_percent < 100:
            raise ValueError(f"outlier_percent: must be 0 up to below 100, not {self.outlier_percent!r}")
        if len(self.outlier) != 2:
            raise ValueError(f"outlier: must be (vector, centroids), not {self.outlier!r}")
        _whole("outlier[0]", self.outlier[0], 1, 256)
        _power("outlier[1]", self.outlier[1])

    @property
    def index_bits(self) -> int:
        """Bits of one index, log2 k + log2 k2."""
        return _log2(self.centroids) + _log2(self.residual or 1)

    def outliers(self, columns: int) -> int:
        """Columns with the outliers' book: the percentage, rounded up, and what the groups would leave over (none without a percentage)."""
        count = -(-columns * self.outlier_percent // 100)
        return int(count + (columns - count) % self.groups) if count else 0

    def group_sizes(self, columns: int) -> list[int]:
        """Columns of each group, outliers not counted: equal but for one, where they cannot be."""
        rest = columns - self.outliers(columns)
        return [rest // self.groups + (g < rest % self.groups) for g in range(self.groups)]

    def layout(self, rows: int, columns: int) -> Layout:
        n = self.outliers(columns)
        rest, k2 = columns - n, self.residual
        longest = max(self.vector, self.outlier[0] if n else 0)
        if 0 < rows < longest:
            raise ValueError(f"vector: {longest} weights of a column, but the matrix has only {rows} rows")
        if columns and rest < self.groups:
            raise ValueError(f"groups: {self.groups} codebooks, but only {rest} of {columns} columns to share them")
        found: Layout = {
            "codes": ((-(-rows // self.vector), kernels.packed_stride(rest, self.index_bits)), torch.uint8),
            "centroids": ((self.groups, self.centroids, self.vector), torch.float16),
        }
        if k2 is not None:
            found["residuals"] = ((self.groups, k2, self.vector), torch.float16)
        if self.groups > 1:
            found["groups"] = ((-(-rest * self._group_bits // 8),), torch.uint8)
        if n:
            v0, k0 = self.outlier
            found["outlier_columns"] = ((n,), torch.int16 if columns <= 1 << 16 else torch.int32)
            found["outlier_codes"] = ((-(-rows // v0), kernels.packed_stride(n, _log2(k0))), torch.uint8)
            found["outlier_centroids"] = ((k0, v0), torch.float16)
        if self.norm:
            found["column_scale"] = found["column_bias"] = ((columns,), torch.float16)
        return found

    @property
    def _group_bits(self) -> int:
        return (self.groups - 1).bit_length()

    def pack(
        self, codes: Tensor, centroids: Tensor, shape: tuple[int, int], *, residuals: Tensor | None = None, groups: Tensor | None = None,
        outlier_columns: Tensor | None = None, outlier_codes: Tensor | None = None, outlier_centroids: Tensor | None = None,
        affine: tuple[Tensor, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """The stored tensors of ``codes [ceil(M / v), N - n]`` int32 (``a + k b``) and books as above; ``groups [N - n]`` integers,
        ``outlier_columns [n]`` int64 rising, ``affine``: scale and bias ``[N]``. Raises ValueError where they do not fit the layout."""
        found = {"codes": kernels.pack_wide(codes.contiguous(), self.index_bits), "centroids": centroids.to(torch.float16)}
        if residuals is not None:
            found["residuals"] = residuals.to(torch.float16)
        if groups is not None and self.groups > 1:
            found["groups"] = pack_stream(groups.to(torch.uint8), self._group_bits)
        if outlier_columns is not None and outlier_codes is not None and outlier_centroids is not None and len(outlier_columns):
            wrapped = torch.where(outlier_columns > 0x7FFF, outlier_columns - (1 << 16), outlier_columns)
            found["outlier_columns"] = wrapped.to(torch.int16) if shape[1] <= 1 << 16 else outlier_columns.to(torch.int32)
            found["outlier_codes"] = kernels.pack_wide(outlier_codes.contiguous(), _log2(self.outlier[1]))
            found["outlier_centroids"] = outlier_centroids.to(torch.float16)
        if affine is not None:
            found["column_scale"], found["column_bias"] = (x.to(torch.float16) for x in affine)
        layout = self.layout(*shape)
        for key in sorted(layout.keys() | found.keys()):
            size = layout[key][0] if key in layout else None
            if key not in found or size != tuple(found[key].shape):
                held = list(found[key].shape) if key in found else "nothing"
                raise ValueError(f"{key}: is {held}, but {self} on {shape[0]} x {shape[1]} needs {size if size is None else list(size)}")
        return found

    def check_stored(self, stored: Mapping[str, Tensor], shape: tuple[int, int]) -> None:
        super().check_stored(stored, shape)
        if "outlier_columns" in stored:
            columns = _unsigned(stored["outlier_columns"])
            if int(columns[-1]) >= shape[1] or int(columns[0]) < 0 or not bool((columns.diff() > 0).all()):
                raise CheckpointError(f"outlier_columns: must rise within 0 .. {shape[1] - 1}")
        if "groups" in stored and shape[1]:
            highest = int(self._groups_of(stored, shape[1]).max())
            if highest >= self.groups:
                raise CheckpointError(f"groups: names group {highest} of {self.groups}")

    def _groups_of(self, stored: Mapping[str, Tensor], columns: int) -> Tensor:
        return unpack_stream(stored["groups"], self._group_bits, columns - self.outliers(columns))

    def decode_stored(self, stored: Mapping[str, Tensor], shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        direct = dtype in (torch.float32, torch.bfloat16)
        out = torch.empty(shape, dtype=dtype if direct else torch.float32, device=stored["codes"].device)
        for part in self.parts(stored, shape):
            kernels.decode_codebook(**part, out=out)
        return out if direct else out.to(dtype)

    def parts(self, stored: Mapping[str, Tensor], shape: tuple[int, int]) -> list[dict[str, Any]]:
        """What `kernels.decode_codebook` and `kernels.CodebookMatrix` take, by name: of the columns that share books, then of the outliers."""
        rows, columns = shape
        affine = (stored["column_scale"].float(), stored["column_bias"].float()) if self.norm else None
        places: Tensor | None = None
        outliers: list[dict[str, Any]] = []
        if "outlier_columns" in stored:
            own = _unsigned(stored["outlier_columns"])
            rest = torch.ones(columns, dtype=torch.bool, device=own.device)
            rest[own] = False
            places = rest.nonzero()[:, 0].to(torch.int32)
            outliers = [{
                "packed": stored["outlier_codes"].contiguous(), "bits": _log2(self.outlier[1]), "rows": rows, "count": len(own), "affine": affine,
                "centroids": stored["outlier_centroids"].float()[None].contiguous(), "place": own.to(torch.int32),
            }]  # fmt: skip
        shared = {
            "packed": stored["codes"].contiguous(), "bits": self.index_bits, "rows": rows, "count": columns if places is None else len(places),
            "centroids": stored["centroids"].float().contiguous(), "place": places, "affine": affine,
            "residuals": stored["residuals"].float().contiguous() if "residuals" in stored else None,
            "group": self._groups_of(stored, columns) if "groups" in stored else None,
        }  # fmt: skip
        return [shared, *outliers]

    def codes(self, stored: Mapping[str, Tensor], shape: tuple[int, int]) -> Tensor:
        """The indices ``[ceil(M / v), N - n]`` int32, ``a + k b``."""
        return kernels.unpack_wide(stored["codes"].contiguous(), self.index_bits, shape[1] - self.outliers(shape[1]))

    def book_bits(self, rows: int, columns: int) -> int:
        """Bits of the books alone."""
        layout = self.layout(rows, columns)
        held = (layout[key][0] for key in ("centroids", "residuals", "outlier_centroids") if key in layout)
        return sum(16 * torch.Size(size).numel() for size in held)

    def to_json(self) -> dict[str, Any]:
        return {"kind": self.kind, **asdict(self), "outlier": list(self.outlier)}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Codebook:
        unknown = set(data) - {f.name for f in fields(cls)}
        if unknown:
            raise ValueError(f"scheme: a codebook has no field {sorted(unknown)[0]!r}")
        try:
            return cls(**data)
        except TypeError as error:
            raise ValueError(f"scheme: {error}") from None

    def __str__(self) -> str:
        found = f"codebook of {self.centroids} vectors of {self.vector}"
        found += f" + {self.residual}" if self.residual is not None else ""
        found += f", {self.groups} groups" if self.groups > 1 else ""
        found += f", {self.outlier_percent:g} % outliers of {self.outlier[1]} x {self.outlier[0]}" if self.outlier_percent else ""
        return found + (", normalised columns" if self.norm else "")


KINDS[Codebook.kind] = Codebook


def _unsigned(columns: Tensor) -> Tensor:
    """int64; int16 holds the bits of an unsigned number."""
    return columns.long() & 0xFFFF if columns.dtype == torch.int16 else columns.long()


def _log2(k: int) -> int:
    return k.bit_length() - 1


def _whole(name: str, value: Any, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ValueError(f"{name}: must be a whole number of {low} to {high}, not {value!r}")


def _power(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not 2 <= value <= 1 << 16 or value & (value - 1):
        raise ValueError(f"{name}: must be a power of two, 2 to 65536, not {value!r}")
