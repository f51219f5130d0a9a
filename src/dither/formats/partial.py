"""PartialBinary: one bit for most weights of a matrix, 2 to 8 bits for a few salient ones (PB-LLM, arXiv 2310.00034, section 3.2).

    w_hat[o, i] = mu[o, g] + alpha[o, g] b[o, i],  b = +-1              where binarised, g = i // group
                  scale[o] (code[o, i] - zero_point[o])                  where salient

How many are salient follows from the share and the shape (section 2 of the method: the smallest ``floor(n rho) + 1`` of the ``n`` values of a
column group are binarised, rho = 1 - salient; all for rho = 1, none for rho = 0), so all sizes do too. Stored tensors, k salient weights:

    signs       uint8 [O, stride]          one bit a weight: b = +1; at salient places the code's highest bit
    codes       uint8 [ceil(k (B - 1) / 8)]  the other bits of salient codes, one stream, row by row in column order
    offsets     uint32 [O]                 salient weights before each row
    alpha, mu   float16 [O, G]
    scale       float16 [O]                of salient codes: asymmetric, min-max over the row
    zero_point  uint8 [ceil(O B / 8)]      one LSB-first stream

and which weights are salient, by whichever is shorter:

    mask                uint8 [O, stride]  a bit a weight: 1 = binarised
    places_low, _high   uint8              the places of the rarer kind, Elias-Fano coded (`kernels.partial`): 0.53 bits a weight for 10 %

so that a weight takes ``rho + (1 - rho) B + mask + (80 + B) / I`` bits. Where none is salient, or all are, what is then empty is left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from fractions import Fraction
from typing import Any, ClassVar

import torch
from torch import Tensor

from dither import kernels
from dither.errors import CheckpointError
from dither.formats.integer import Int
from dither.formats.packing import pack_rows, pack_stream, row_stride, unpack_rows, unpack_stream
from dither.formats.qtensor import QTensor
from dither.formats.stored import KINDS, Layout, WeightScheme

CODINGS = ("shorter", "flat")
LOW_BITS = 8  # most bits of a place that are stored as they are
LARGEST = 65504.0  # of float16


@dataclass(frozen=True)
class PartialBinary(WeightScheme):
    """``salient``: share of weights that keep ``high_bits`` bits, 0 to 1, read as the decimal number it prints as. ``group``: inputs that share
    alpha and mu, and of which the share is salient; None: a row has one alpha and mu, and the share is of the whole matrix. ``mask``: "flat", a
    bit a weight, or "shorter", a list of places where that takes less. Raises ValueError for values out of range."""

    kind: ClassVar[str] = "partial-binary"

    salient: float
    high_bits: int = 8
    group: int | None = None
    mask: str = "shorter"

    def __post_init__(self) -> None:
        if isinstance(self.salient, bool) or not isinstance(self.salient, int | float) or not 0 <= self.salient <= 1:
            raise ValueError(f"salient must be within 0 .. 1, not {self.salient!r}")
        object.__setattr__(self, "salient", float(self.salient))
        if isinstance(self.high_bits, bool) or not isinstance(self.high_bits, int) or not 2 <= self.high_bits <= 8:
            raise ValueError(f"high_bits must be 2 to 8, not {self.high_bits!r}")
        if self.group is not None and (isinstance(self.group, bool) or not isinstance(self.group, int) or self.group < 1):
            raise ValueError(f"group must be a positive number of inputs or None, not {self.group!r}")
        if self.mask not in CODINGS:
            raise ValueError(f"mask must be one of {', '.join(CODINGS)}, not {self.mask!r}")

    @property
    def high(self) -> Int:
        """The format of salient weights; one block a row."""
        return Int(self.high_bits)

    def width(self, columns: int) -> int:
        """Inputs of a column group. Raises ValueError where the groups do not divide the row."""
        if self.group is None or columns == 0:
            return max(columns, 1)
        if columns % self.group:
            raise ValueError(f"group: {self.group} does not divide the {columns} inputs")
        return self.group

    def column_groups(self, columns: int) -> Tensor:
        """``[I]`` int64: the column group of each input."""
        return torch.arange(columns) // self.width(columns)

    def binarised(self, rows: int, columns: int) -> int:
        """How many weights of each column group of a matrix ``[rows, columns]`` are binarised."""
        n, rho = rows * min(self.width(columns), columns), 1 - Fraction(repr(self.salient))
        return n if rho == 1 else 0 if rho == 0 else min(n, int(n * rho) + 1)

    def salient_count(self, rows: int, columns: int) -> int:
        """Salient weights of the whole matrix."""
        return rows * columns - self.binarised(rows, columns) * (columns // self.width(columns))

    def choose(self, values: Tensor) -> Tensor:
        """``M [O, I]`` bool, True where binarised: the least salient of ``values [O, I]`` of each column group; of equal ones the first
        in the order of rows. Raises ValueError for NaN."""
        rows, columns = values.shape
        count, width = self.binarised(rows, columns), self.width(columns)
        chosen = torch.zeros(values.shape, dtype=torch.bool, device=values.device)
        if count == 0:
            return chosen
        if bool(values.isnan().any()):
            raise ValueError("values: hold NaN")
        for first in range(0, columns, width):
            flat = values[:, first : first + width].reshape(-1)  # (O g,)
            threshold = flat.kthvalue(count).values
            own, ties = flat < threshold, flat == threshold
            own |= ties & (ties.cumsum(0) <= count - own.sum())
            chosen[:, first : first + width] = own.view(rows, -1)
        return chosen

    def _listed(self, rows: int, columns: int) -> tuple[int, int, int] | None:
        """(places listed, their low bits, bytes of the high part) where a list is used; None where a bitmap is, or neither."""
        total, salient = rows * columns, self.salient_count(rows, columns)
        count = min(salient, total - salient)
        if count == 0 or self.mask == "flat":
            return None
        bits, low = min((count * low + count + (total - 1 >> low), low) for low in range(LOW_BITS + 1))
        if -(-count * low // 8) + -(-(bits - count * low) // 8) >= rows * row_stride(columns, 1):
            return None
        return count, low, -(-(bits - count * low) // 8)

    def _lists_salient(self, rows: int, columns: int) -> bool:
        """Whether the salient weights are the rarer kind, which a list names."""
        return 2 * self.salient_count(rows, columns) <= rows * columns

    def layout(self, rows: int, columns: int) -> Layout:
        salient, groups = self.salient_count(rows, columns), columns // self.width(columns)
        if salient >= 1 << 32:
            raise ValueError(f"salient: {salient} salient weights of one matrix are more than offsets can count")
        found: Layout = {"signs": ((rows, row_stride(columns, 1)), torch.uint8)}
        if salient < rows * columns or salient == 0:
            found["alpha"] = found["mu"] = ((rows, groups), torch.float16)
        if salient == 0:
            return found
        found["codes"] = ((-(-salient * (self.high_bits - 1) // 8),), torch.uint8)
        found["scale"] = ((rows,), torch.float16)
        found["zero_point"] = ((-(-rows * self.high_bits // 8),), torch.uint8)
        if salient == rows * columns:
            return found
        found["offsets"] = ((rows,), torch.uint32)
        if (listed := self._listed(rows, columns)) is None:
            found["mask"] = ((rows, row_stride(columns, 1)), torch.uint8)
        else:
            count, low, high_bytes = listed
            found["places_low"], found["places_high"] = ((-(-count * low // 8),), torch.uint8), ((high_bytes,), torch.uint8)
        return found

    def pack(self, binary: Tensor, codes: Tensor, alpha: Tensor, mu: Tensor, scale: Tensor, zero_point: Tensor) -> QTensor:
        """``binary [O, I]`` bool: where binarised; ``codes [O, I]`` uint8: 0 or 1 there, salient codes elsewhere; ``alpha``, ``mu``
        ``[O, G]``; ``scale``, ``zero_point`` ``[O]``. Raises ValueError where the number of salient weights is not the scheme's."""
        rows, columns = binary.shape
        self._check_counts(binary)
        stored = {
            "signs": pack_rows(torch.where(binary, codes, codes >> (self.high_bits - 1)), 1),
            "alpha": half(alpha).to(torch.float16),
            "mu": half(mu).to(torch.float16),
            "codes": pack_stream(codes[~binary] & (1 << (self.high_bits - 1)) - 1, self.high_bits - 1),
            "scale": scale.reshape(-1).to(torch.float16),
            "zero_point": pack_stream(zero_point.reshape(-1).to(torch.uint8), self.high_bits),
            "offsets": _offsets(binary),
            "mask": pack_rows(binary.to(torch.uint8), 1),
        }
        if (listed := self._listed(rows, columns)) is not None:
            stored["places_low"], stored["places_high"] = _places(~binary if self._lists_salient(rows, columns) else binary, *listed)
        layout = self.layout(rows, columns)
        return QTensor({key: stored[key] for key in layout}, self, (rows, columns))

    def binary_of(self, stored: Mapping[str, Tensor], shape: tuple[int, int]) -> Tensor:
        """``M [O, I]`` bool, True where binarised."""
        mask = self._mask(stored, shape)
        if mask is None:
            return torch.full(shape, "codes" not in stored, device=stored["signs"].device)
        return unpack_rows(mask, 1, shape[1]).bool()

    def _mask(self, stored: Mapping[str, Tensor], shape: tuple[int, int]) -> Tensor | None:
        """The bitmap of M; None where all weights are of one kind."""
        if "places_high" not in stored:
            return stored.get("mask")
        listed = self._listed(*shape)
        assert listed is not None
        salient = self._lists_salient(*shape)
        return kernels.places_to_bitmap(stored["places_low"], listed[1], stored["places_high"], listed[0], *shape, listed=not salient)

    def decode_stored(self, stored: Mapping[str, Tensor], shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        fast = dtype if dtype in (torch.float32, torch.bfloat16) else torch.float32
        return kernels.dequantize_partial(*self.parts(stored, shape), fast).to(dtype)

    def parts(
        self, stored: Mapping[str, Tensor], shape: tuple[int, int]
    ) -> tuple[Tensor | None, Tensor, Tensor, Tensor, Tensor | None, int, Tensor | None, Tensor, Tensor, int, int]:
        """What `kernels.dequantize_partial` and `kernels.PartialMatrix` take: M as a bitmap, levels and zero points as numbers."""
        rows, columns = shape
        plane = stored["signs"]
        zeros = torch.zeros(rows, max(columns // self.width(columns), 1), device=plane.device)
        alpha, mu = (stored[k].to(torch.float32) if k in stored else zeros[:, : columns // self.width(columns)] for k in ("alpha", "mu"))
        codes = stored.get("codes")
        scale, zero = zeros[:, 0], zeros[:, 0]
        if codes is not None:
            scale = stored["scale"].to(torch.float32)
            zero = unpack_stream(stored["zero_point"], self.high_bits, rows).to(torch.float32)
        return (
            self._mask(stored, shape), plane, mu - alpha, mu + alpha, codes, self.high_bits, stored.get("offsets"),
            scale.contiguous(), zero.contiguous(), self.width(columns), columns,
        )  # fmt: skip

    def check_stored(self, stored: Mapping[str, Tensor], shape: tuple[int, int]) -> None:
        super().check_stored(stored, shape)
        if "offsets" not in stored:
            return
        if "mask" in stored:
            padding = unpack_rows(stored["mask"], 1, 8 * stored["mask"].shape[1])[:, shape[1] :]
            if bool(padding.any()):
                raise CheckpointError("mask: has bits beyond the last column")
        else:
            self._check_places(stored, shape)
        binary = self.binary_of(stored, shape)
        try:
            self._check_counts(binary)
        except ValueError as error:
            raise CheckpointError(str(error)) from None
        if not torch.equal(stored["offsets"].to(torch.int64), _offsets(binary).to(torch.int64)):
            raise CheckpointError("offsets: are not where the salient weights of each row begin")

    def _check_places(self, stored: Mapping[str, Tensor], shape: tuple[int, int]) -> None:
        """Raises CheckpointError unless the listed places rise and stay within the matrix."""
        listed = self._listed(*shape)
        assert listed is not None
        count, low_bits, _ = listed
        high = unpack_stream(stored["places_high"], 1, 8 * stored["places_high"].numel()).nonzero()[:, 0]
        if len(high) != count:
            raise CheckpointError(f"places_high: lists {len(high)} places, but the scheme has {count}")
        places = high - torch.arange(count, device=high.device)
        if low_bits:
            places = (places << low_bits) + unpack_stream(stored["places_low"], low_bits, count).long()
        if not bool((places.diff() > 0).all()) or int(places[-1]) >= shape[0] * shape[1]:
            raise CheckpointError("places_low: the places do not rise, or lie beyond the matrix")

    def _check_counts(self, binary: Tensor) -> None:
        """Raises ValueError unless each column group has as many salient weights as the scheme says."""
        rows, columns = binary.shape
        want, width = self.binarised(rows, columns), self.width(columns)
        found = binary.view(rows, -1, width).sum((0, 2)) if columns else binary.new_zeros(0, dtype=torch.int64)
        if not bool((found == want).all()):
            raise ValueError(f"mask: binarises {found.tolist()[:4]} weights of its column groups, but {self} means {want}")

    def to_json(self) -> dict[str, Any]:
        return {"kind": self.kind, **{f.name: getattr(self, f.name) for f in fields(self)}}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> PartialBinary:
        unknown = set(data) - {f.name for f in fields(cls)}
        if unknown or "salient" not in data:
            raise ValueError(f"scheme: has fields {sorted(data)}; partial-binary needs salient, and may have high_bits, group and mask")
        return cls(**data)

    def __str__(self) -> str:
        groups = "" if self.group is None else f" group({self.group})"
        return f"binary{groups} + {100 * self.salient:g} % int{self.high_bits}"


KINDS[PartialBinary.kind] = PartialBinary


def half(x: Tensor) -> Tensor:
    """Rounded to what float16 holds, in its own type."""
    return x.clamp(-LARGEST, LARGEST).to(torch.float16).to(x.dtype)


def _offsets(binary: Tensor) -> Tensor:
    """``[O]`` uint32: salient weights before each row."""
    own = (~binary).sum(1)
    return (own.cumsum(0) - own).to(torch.uint32)


def _places(chosen: Tensor, count: int, low_bits: int, high_bytes: int) -> tuple[Tensor, Tensor]:
    """The ``count`` places where ``chosen [O, I]`` is true, row by row, Elias-Fano coded: see `kernels.partial`."""
    places = chosen.reshape(-1).nonzero()[:, 0]
    low = (places & (1 << low_bits) - 1).to(torch.uint8)
    high = torch.zeros(8 * high_bytes, dtype=torch.uint8, device=chosen.device)
    high[(places >> low_bits) + torch.arange(count, device=chosen.device)] = 1
    empty = torch.zeros(0, dtype=torch.uint8, device=chosen.device)
    return pack_stream(low, low_bits) if low_bits else empty, pack_stream(high, 1)
