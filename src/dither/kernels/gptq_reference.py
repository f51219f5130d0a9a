"""The column loop of GPTQ in torch: what the C++ kernel must agree with.

Frantar, Ashkboos, Hoefler, Alistarh: GPTQ, ICLR 2023, arXiv 2210.17323, section 3.3, with lazy batches (section 3.2):

    for each block [i1, i2), for each column c in it:
        q_c = nearest grid value to w_c;   e_c = (w_c - q_c) / U_cc;   w_j <- w_j - e_c U_cj  for j > c in the block
    W[:, i2:] <- W[:, i2:] - E U[i1:i2, i2:]
"""

from __future__ import annotations

import torch
from torch import Tensor

from dither.kernels.grids import ColumnGrid, MixedGrid


def gptq_reference(
    weight: Tensor, factor: Tensor, column_group: Tensor, grid: ColumnGrid, block: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Arguments as `dither.kernels.gptq_columns`, the grid in the weight's dtype. Returns codes ``[O, I]``, loss
    ``[O]``, errors ``[O, I]``.
    """
    work = weight.clone()
    columns = work.shape[1]
    codes = torch.empty(work.shape, dtype=torch.uint8, device=work.device)
    errors = torch.empty_like(work)
    groups = column_group.tolist()
    for i1 in range(0, columns, block):
        i2 = min(i1 + block, columns)
        inside = work[:, i1:i2].T.contiguous()  # (B, O): one column of the weight is one row here
        for c in range(i1, i2):
            w = inside[c - i1]  # (O,)
            own = grid.at(c) if isinstance(grid, MixedGrid) else grid
            codes[:, c] = own.encode(w, groups[c])
            e = (w - own.decode(codes[:, c], groups[c])) / factor[c, c]
            errors[:, c] = e
            inside[c - i1 + 1 :].addr_(factor[c, c + 1 : i2], e, alpha=-1)
        work[:, i2:].addmm_(errors[:, i1:i2], factor[i1:i2, i2:], alpha=-1)
    return codes, errors.double().square().sum(1) / 2, errors
