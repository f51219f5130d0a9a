"""Gram matrices ``H = sum_t x_t x_t^T``, gathered batch by batch in float64.

Products are summed in float32 within 512 rows (by the processor's FMAs or, for bfloat16 rows, its bfloat16 dot
products, which are exact but for their float32 sums), in float64 across them. By symmetry only the upper triangle is
computed: T I^2 / 2 multiply-adds. `gram_finish` fills in the other half, when H is read.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dither.kernels.checks import check
from dither.kernels.extension import backend, extension, isa, threads
from dither.kernels.gram_reference import gram_finish_reference, gram_update_reference


def gram_update(hessian: Tensor, x: Tensor) -> None:
    """``hessian [I, I]`` float64 ``+= x^T x`` for ``x [T, I]`` float32 or bfloat16, in place; only its upper triangle
    is then right.

    Raises ValueError for other shapes and dtypes, and for tensors that are not contiguous.
    """
    check("x", x, (None, None), (torch.float32, torch.bfloat16))
    check("hessian", hessian, (x.shape[1], x.shape[1]), (torch.float64,))
    native = extension() if x.device.type == "cpu" else None
    if native is None or (not isa() and backend() == "scalar"):  # torch has vectors where this build has none
        gram_update_reference(hessian, x.detach())
        return
    rows = x.detach()
    native.gram_update(hessian, rows.view(torch.int16) if x.dtype == torch.bfloat16 else rows, isa(), threads())


def gram_finish(hessian: Tensor) -> Tensor:
    """Copies the upper triangle of ``hessian [I, I]`` float64 onto the lower one, in place; returns ``hessian``. More
    updates may follow.
    """
    check("hessian", hessian, (None, hessian.shape[-1]), (torch.float64,))
    check("hessian", hessian, (hessian.shape[1], hessian.shape[1]), (torch.float64,))
    native = extension() if hessian.device.type == "cpu" else None
    if native is None:
        return gram_finish_reference(hessian)
    native.gram_mirror(hessian, threads())
    return hessian
