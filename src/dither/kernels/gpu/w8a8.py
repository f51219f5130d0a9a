"""Products of int8: weights of 8 bits with one scale a row, inputs rounded to int8 row by row when they arrive.

    s_t = max_i |x[t, i]| / 127,   q[t, i] = round(x[t, i] / s_t)                   (ties to even; `Int(8, sym="restricted")` by token)
    y[t, o] = s_t scale[o] sum_i (code[o, i] - zero[o]) q[t, i]                     (sums int32, exact)

That is x_hat W_hat^T of dither's rounded layers, up to two float32 roundings. Reads one byte a weight; rounding x is a kernel of its own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dither.kernels.checks import check
from dither.kernels.gpu.presence import check_device, on_device
from dither.kernels.gpu.rounded import product
from dither.kernels.gpu.tuning import Plan
from dither.kernels.packing import packed_stride

TYPES = (torch.bfloat16, torch.float16, torch.float32)
MOST = (2**31 - 1) // (127 * 255 + 1)  # columns whose sums an int32 holds


def int8_matmul(
    x: Tensor, packed: Tensor, scale: Tensor, zero: Tensor | None, input_scale: str = "float32", plan: Plan | None = None
) -> Tensor:
    """``x [T, I]`` bfloat16, float16 or float32, ``packed [O, stride]`` uint8 codes of 8 bits, ``scale [O, 1]`` float16, bfloat16 or float32,
    ``zero`` uint8 ``[O]`` or None for 128 -> ``[T, O]`` in the type of x. ``input_scale``: what the scales of rows are rounded to.

    Rows with NaN or inf become NaN. No gradients. Raises ValueError for other shapes, dtypes and devices.
    """
    check("x", x, (None, None), TYPES)
    if x.shape[1] > MOST:
        raise ValueError(f"x: {x.shape[1]} columns, must be at most {MOST}: the sums are int32")
    check("packed", packed, (None, packed_stride(x.shape[1], 8)), (torch.uint8,))
    check("scale", scale, (packed.shape[0], 1), TYPES)
    if zero is not None:
        check("zero", zero, (packed.shape[0],), (torch.uint8,))
    check_device("int8_matmul", x, packed, scale, zero)
    with on_device(x):
        return product("int8", x, 127.0, input_scale, packed, scale, zero, plan)
