"""Format: the set of numbers that a few bits can name.

A format sees only blocked values ``x (..., n)``, float32 or float64, and returns parameters of shape ``(...)``, one a block. It knows nothing
of channels or groups: `blocks` cuts tensors before a format sees them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from dither.kernels import ColumnGrid

if TYPE_CHECKING:
    from dither.formats.blocks import Blocks
    from dither.formats.scheme import Scheme

Params = dict[str, Tensor]
"""``scale``, ``zero_point`` (whole numbers, as floats), ``offset``: one a block; ``global_scale``: one a tensor, shape ``()``."""


class Format(ABC):
    """Base of all formats: frozen dataclasses, final, registered by class name for JSON."""

    bits: int

    @property
    def highest_code(self) -> int:
        """The largest code that names a number: below ``2 ** bits - 1`` where a stored code has room for more than there are."""
        return (1 << self.bits) - 1

    @abstractmethod
    def range(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Smallest and largest value of each block, ``(...)``, widened to what the format's grid must contain."""

    @abstractmethod
    def params(self, lo: Tensor, hi: Tensor, shared: Params | None = None) -> Params:
        """The grid that spans ``[lo, hi]``, scales already rounded to their storage type."""

    def shared(self, x: Tensor) -> Params:
        """Parameters that all blocks of a tensor share."""
        return {}

    def fit(self, x: Tensor, shared: Params | None = None) -> Params:
        """The min-max grid of each block."""
        lo, hi = self.range(x)
        return self.params(lo, hi, self.shared(x) if shared is None else shared)

    @abstractmethod
    def encode(self, x: Tensor, params: Params) -> Tensor:
        """The nearest codes, uint8 ``(..., n)``; ties go to the even code."""

    @abstractmethod
    def decode(self, codes: Tensor, params: Params) -> Tensor:
        """The values of ``codes``, in the type of the parameters."""

    @abstractmethod
    def quantize(self, x: Tensor, params: Params) -> Tensor:
        """``decode(encode(x))`` without the codes in between."""

    @abstractmethod
    def column_grid(self, params: Mapping[str, Tensor]) -> ColumnGrid:
        """The grid ``[O, G]`` in the form that kernels loop over."""

    @abstractmethod
    def param_bits(self) -> dict[str, int]:
        """Stored bits of each per-block parameter."""

    @abstractmethod
    def to_json(self) -> dict[str, Any]:
        """The format as plain data, with its ``kind``."""

    def __matmul__(self, blocks: Blocks) -> Scheme:
        from dither.formats.scheme import Scheme

        return Scheme(self, blocks)


def expand(parameter: Tensor) -> Tensor:
    """``(...)`` -> ``(..., 1)``: a block parameter against the block's values."""
    return parameter.unsqueeze(-1)


def as_like(params: Mapping[str, Tensor], x: Tensor) -> Params:
    """Parameters in the type and on the device of ``x``."""
    return {k: v.to(device=x.device, dtype=x.dtype) for k, v in params.items()}
