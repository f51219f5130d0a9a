"""Products of float8 e4m3: weights with one scale a row or a tensor, inputs rounded row by row when they arrive.

    s_t = max_i |x[t, i]| / 448 (1 for a row of zeros),   q[t, i] = e4m3(x[t, i] / s_t)      (ties to even; `Float(4, 3)` by token)
    y[t, o] = s_t scale[o] sum_i e4m3(code[o, i]) q[t, i]                                    (sums float32)

Hardware from NVIDIA's capability 8.9 on (Ada, Hopper). Reads one byte a weight; rounding x is a kernel of its own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dither.kernels.checks import check
from dither.kernels.gpu.presence import check_device, has_float8, on_device
from dither.kernels.gpu.rounded import product
from dither.kernels.gpu.tuning import Plan
from dither.kernels.packing import packed_stride

TYPES = (torch.bfloat16, torch.float16, torch.float32)


def float8_matmul(x: Tensor, packed: Tensor, scale: Tensor, input_scale: str = "float32", plan: Plan | None = None) -> Tensor:
    """``x [T, I]`` bfloat16, float16 or float32, ``packed [O, stride]`` uint8 bit patterns of e4m3 (finite, with NaN), ``scale [O, 1]`` or ``[1, 1]``
    float16, bfloat16 or float32 -> ``[T, O]`` in the type of x. ``input_scale``: what the scales of rows are rounded to.

    Rows with NaN or inf become NaN. No gradients. Raises ValueError for other shapes, dtypes and devices, RuntimeError where the device lacks float8.
    """
    check("x", x, (None, None), TYPES)
    check("packed", packed, (None, packed_stride(x.shape[1], 8)), (torch.uint8,))
    check("scale", scale, (None, 1), TYPES)
    if scale.shape[0] not in (1, packed.shape[0]):
        raise ValueError(f"scale: shape {list(scale.shape)}, must be [{packed.shape[0]}, 1] or [1, 1]")
    check_device("float8_matmul", x, packed, scale)
    if not has_float8(x.device):
        raise RuntimeError(f"float8_matmul: {torch.cuda.get_device_name(x.device)} does not multiply float8; decode the weights instead")
    with on_device(x):
        return product("float8", x, 448.0, input_scale, packed.view(torch.float8_e4m3fn), scale, None, plan)
