"""Products of a few rows with matrices of two levels and a few wider codes (`kernels.partial`), which are not decoded to memory.

    y[t, o] = sum_i w[o, i] x[t, i],   w = high or low where mask, scale (code - zero) elsewhere

It reads two bits a weight and ``bits - 1`` a salient one. With AVX-512 VBMI2, and groups of whole sixteens, codes are spread to their columns in
registers: seven operations on sixteen weights and one more a row of x. Otherwise a row of weights at a time is decoded, within the caches. Weights,
products and sums are float32, the weights those of `kernels.dequantize_partial`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dither.kernels.checks import check
from dither.kernels.extension import extension, isa, threads
from dither.kernels.partial import check_parts
from dither.kernels.partial_matmul_reference import partial_matmul_reference


class PartialMatrix:
    """The weights, in the parts that `kernels.dequantize_partial` takes and explains. Bits and codes are not copied. ValueError for parts that do not
    fit one another."""

    def __init__(
        self, mask: Tensor | None, plane: Tensor, low: Tensor, high: Tensor, codes: Tensor | None, bits: int, offsets: Tensor | None,
        scale: Tensor, zero: Tensor, group: int, columns: int,
    ) -> None:
        check_parts(mask, plane, low, high, codes, bits, offsets, scale, zero, group, columns)
        self.bits, self.group, self.columns, self._rows = bits, group, columns, plane.shape[0]
        self.mask, self.plane, self.codes, self.offsets = mask, plane, codes, offsets
        self.low, self.high, self.scale, self.zero = (p.detach().float() for p in (low, high, scale, zero))
        self._weights = (
            self._rows, columns, group, bits - 1, _address(mask), _address(plane), _address(self.low), _address(self.high), _address(codes),
            0 if codes is None else codes.numel(), _address(offsets), _address(self.scale), _address(self.zero),
        )  # fmt: skip

    def __call__(self, x: Tensor) -> Tensor:
        """``x [T, I]``, dense, float32 or bfloat16 -> ``[T, O]`` in the type of x. ValueError where it is something else, or wants a gradient."""
        check("x", x, (None, self.columns), (torch.float32, torch.bfloat16))
        if x.requires_grad and torch.is_grad_enabled():
            raise ValueError("x: products with stored weights have no gradient; decode the weights first")
        native = extension() if x.device.type == "cpu" else None
        if native is None:
            return partial_matmul_reference(
                x, self.mask, self.plane, self.low, self.high, self.codes, self.bits, self.scale, self.zero, self.group
            )
        wide, y = x.float(), torch.empty(x.shape[0], self._rows)
        native.partial_matmul(*self._weights, wide.data_ptr(), x.shape[0], y.data_ptr(), isa(), threads())
        return y.to(x.dtype)


def _address(part: Tensor | None) -> int:
    return 0 if part is None else part.data_ptr()
