"""Products with weights stored as indices of vectors in torch: what the C++ kernel must agree with, up to the order of its sums."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from dither.kernels.codebook_reference import decode_reference


def codebook_matmul_reference(
    x: Tensor, packed: Tensor, bits: int, count: int, centroids: Tensor, residuals: Tensor | None, group: Tensor | None, place: Tensor | None,
    affine: tuple[Tensor, Tensor] | None, rows: int,
) -> Tensor:
    """``x [T, I]`` float32 ``-> [T, rows]``; the other arguments as in `dither.kernels.decode_codebook`: decoded, then multiplied."""
    values = decode_reference(packed, bits, count, centroids, residuals, group, rows)
    own = x if place is None else x[:, place.long()]
    if affine is not None:
        scale, bias = affine if place is None else (part[place.long()] for part in affine)
        values = values * scale + bias
    return F.linear(own, values)
