"""Products with packed weights: what a layer of few-bit weights does with its inputs, whether they are a token or a prompt.

    y[t, o] = sum_i scale[o, g] (value(code[o, i]) - zero[o, g]) x[t, i],   g = i // group

A code is its own value, or names one of a table of ``2^bits``: those of a small float, say.

**Up to 8 rows** the time is that of reading the weights from memory: one C++ call reads each once, ``bits / 8`` bytes, decodes it in registers and
writes it nowhere. Processors with AVX512_BF16 take bfloat16 products (each exact) where groups are multiples of a few columns and bfloat16 holds the
values, as it does those of all `formats.Float`; there a float32 x enters as the sum of two bfloat16 numbers, which is right to 2^-16 of each product.
Elsewhere, and for tables of 8 bits whose top bit is no sign, values and products are float32.

**From 9 rows on** it is that of the products: ``2 T O I`` operations. A few panels of the weight at a time are decoded into the first cache, where
all rows of x pass by. With AVX512_BF16 a bfloat16 x meets weights rounded to bfloat16, those of `dequantize_affine`, in bfloat16 products; otherwise
everything is float32, on AVX-512, AVX2 or neither. Beside x and y, memory holds a copy of some rows of x: 512 of them, or 2 MiB.

Sums are float32. A row of y depends on that row of x alone, not on the rows beside it, how many they are (up to 8, or from 9 on) or the number of
threads, to the last bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dither.kernels.caches import cache_bytes
from dither.kernels.checks import check, check_bits
from dither.kernels.dequantize import dequantize_affine
from dither.kernels.extension import extension, isa, threads
from dither.kernels.packed_matmul_reference import packed_matmul_reference
from dither.kernels.packing import packed_stride

FEW_ROWS = 8
"""Rows of x up to which the reading of weights takes the time; above, products do."""

SCALES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.float8_e8m0fnu: 3, torch.float8_e4m3fn: 4}
WIDE_SCALES = tuple(SCALES)[:3]


def packed_matmul(
    x: Tensor, packed: Tensor, bits: int, scale: Tensor, zero: Tensor | float, group: int, *, values: Tensor | None = None, tensor_scale: float = 1.0
) -> Tensor:
    """``x [T, I]`` float32 or bfloat16, ``packed [O, stride]`` uint8 (see `dither.kernels.packing`) -> ``[T, O]`` in the type of x.

    ``scale [O, ceil(I / group)]`` float32, float16, bfloat16, float8_e8m0fnu or float8_e4m3fn, times ``tensor_scale``; ``zero`` of that shape, uint8,
    or one number for all; ``values [2^bits]`` float32, finite: what codes mean (None: themselves). No gradients. Raises ValueError for other shapes,
    dtypes, widths and strides.
    """
    check("x", x, (None, None), (torch.float32, torch.bfloat16))
    return PackedMatrix(packed, bits, scale, zero, group, x.shape[1], values=values, tensor_scale=tensor_scale)(x)


def check_weights(
    packed: Tensor, bits: int, scale: Tensor, zero: Tensor | float, group: int, columns: int, scales: tuple[torch.dtype, ...] = tuple(SCALES)
) -> None:
    """Raises ValueError unless these are packed weights of so many columns with a scale, of one of the types ``scales``, and a zero point, a group of
    a row."""
    check_bits(bits)
    if group < 1:
        raise ValueError(f"group: must be at least 1, not {group}")
    check("packed", packed, (None, packed_stride(columns, bits)), (torch.uint8,))
    shape = (packed.shape[0], -(-columns // group))
    check("scale", scale, shape, scales)
    if isinstance(zero, Tensor):
        check("zero", zero, shape, (torch.uint8,))


class PackedMatrix:
    """The weights of `packed_matmul`, checked once. They are not copied: what changes in them changes the products."""

    def __init__(
        self, packed: Tensor, bits: int, scale: Tensor, zero: Tensor | float, group: int, columns: int, *, values: Tensor | None = None,
        tensor_scale: float = 1.0,
    ) -> None:
        check_weights(packed, bits, scale, zero, group, columns)
        if values is not None:
            check("values", values, (1 << bits,), (torch.float32,))
            if not bool(values.isfinite().all()):
                raise ValueError("values: holds NaN or inf")
        self.values, self.tensor_scale = values, tensor_scale
        self.packed, self.bits, self.scale, self.zero, self.group, self.columns = packed.detach(), bits, scale.detach(), zero, group, columns
        zeros = zero if isinstance(zero, Tensor) else None
        self._rows = self.packed.shape[0]
        self._weights = (
            self.packed.data_ptr(), self._rows, columns, bits, self.scale.data_ptr(), SCALES[scale.dtype], tensor_scale,
            0 if values is None else values.data_ptr(), 0 if zeros is None else zeros.data_ptr(),
            0.0 if isinstance(zero, Tensor) else float(zero), group,
        )  # fmt: skip

    def rows(self, index: Tensor, dtype: torch.dtype) -> Tensor:
        """The decoded rows at ``index [N]``, ``[N, I]`` in ``dtype``, float32 or bfloat16."""
        stored = self.scale  # in bytes, of which torch picks no rows
        scale = stored[index] if stored.element_size() > 1 else stored.view(torch.uint8)[index].view(stored.dtype)
        scale = scale.float() * self.tensor_scale
        zero = self.zero[index] if isinstance(self.zero, Tensor) else scale.new_full(scale.shape, self.zero, dtype=torch.float32)
        return dequantize_affine(self.packed[index], self.bits, scale, zero, self.group, self.columns, dtype, self.values)

    def __call__(self, x: Tensor) -> Tensor:
        """``x [T, I]``, dense, float32 or bfloat16 -> ``[T, O]``. ValueError where it is something else, or wants a gradient."""
        if x.dim() != 2 or x.shape[1] != self.columns or x.dtype not in (torch.float32, torch.bfloat16) or not x.is_contiguous():
            check("x", x, (None, self.columns), (torch.float32, torch.bfloat16))
        if x.requires_grad and torch.is_grad_enabled():
            raise ValueError("x: products with packed weights have no gradient; decode the weights first")
        native = extension() if x.device.type == "cpu" else None
        if native is None:
            return packed_matmul_reference(x, self.packed, self.bits, self.scale, self.zero, self.group, self.values, self.tensor_scale)
        tokens, exact = x.shape[0], x.dtype == torch.float32
        if tokens > FEW_ROWS:
            y = torch.empty(tokens, self._rows, dtype=x.dtype)
            caches = cache_bytes(1), cache_bytes(2)
            native.packed_gemm(*self._weights, x.data_ptr(), tokens, not exact, y.data_ptr(), *caches, 0, isa(), threads())
            return y
        wide, y = x if exact else x.float(), torch.empty(tokens, self._rows)
        native.packed_matmul(*self._weights, wide.data_ptr(), tokens, exact, y.data_ptr(), isa(), threads())
        return y if exact else y.to(x.dtype)
