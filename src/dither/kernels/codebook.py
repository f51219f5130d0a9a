"""Codebooks of vectors (a vector is v consecutive rows of one column): nearest centroids, the sweep over columns that passes errors on, and
decoding.

    nearest   a(x) = argmin_c |x - C_c|^2 = argmin_c |C_c|^2 / 2 - x C_c
    sweep     x_j = X_j + sum_{i < j} e_i mix_ji,   q_j = C[a(x_j)] (+ R[b(x_j - C[a])]),   e_j = q_j - base_j      (base_j = x_j by default)

The sweep is GPTQ's and VPTQ's column loop with ``mix_ji = U_ij / U_ii``, and coordinate descent in the metric H with ``mix_ji = -H_ij / H_jj`` and
the present values as base. Reads v multiply-adds a centroid and vector, plus I^2 / 2 a row for passing errors on.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dither.kernels.checks import check, check_range
from dither.kernels.codebook_reference import decode_reference, nearest_reference, sweep_reference
from dither.kernels.extension import extension, isa, threads
from dither.kernels.packing import packed_stride

_REAL = (torch.float32, torch.float64)


def nearest_centroids(vectors: Tensor, centroids: Tensor) -> Tensor:
    """``vectors [n, v]``, ``centroids [k, v]`` (float32 or float64) -> int32 ``[n]``; the first of equally near ones.

    Raises ValueError for other shapes, dtypes and strides, and for no centroids.
    """
    check("vectors", vectors, (None, None), _REAL)
    check("centroids", centroids, (None, vectors.shape[1]), (vectors.dtype,))
    _check_size("centroids", centroids)
    native = extension() if vectors.device.type == "cpu" else None
    if native is None:
        return nearest_reference(vectors, centroids)
    codes = torch.empty(len(vectors), dtype=torch.int32)
    native.codebook_nearest(vectors, centroids, _half_square(centroids), codes, isa(), threads())
    return codes


def sweep_columns(
    values: Tensor, mix: Tensor, centroids: Tensor, residuals: Tensor | None = None, base: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The sweep above over ``values [R v, N]``, with ``mix [N, N]`` (what is on and above its diagonal is not read), ``centroids [k, v]``,
    ``residuals [k2, v]`` and ``base [R v, N]``, all float32 or all float64.

    Returns ``codes [R, N]`` int32, ``a + k b``, and ``e [R v, N]``. Raises ValueError for other shapes, dtypes and strides.
    """
    check("values", values, (None, None), _REAL)
    rows, columns = values.shape
    check("centroids", centroids, (None, None), (values.dtype,))
    _check_size("centroids", centroids)
    size, v = centroids.shape
    if v < 1 or rows % v:
        raise ValueError(f"values: {rows} rows are no whole vectors of {v}")
    check("mix", mix, (columns, columns), (values.dtype,))
    if residuals is not None:
        check("residuals", residuals, (None, v), (values.dtype,))
        _check_size("residuals", residuals)
        if size * len(residuals) >= 1 << 31:
            raise ValueError(f"residuals: {size} x {len(residuals)} codes do not fit 31 bits")
    if base is not None:
        check("base", base, (rows, columns), (values.dtype,))
    native = extension() if values.device.type == "cpu" else None
    if native is None:
        return sweep_reference(values, mix, centroids, residuals, base)
    codes = torch.empty(rows // v, columns, dtype=torch.int32)
    errors = torch.empty_like(values)
    second = None if residuals is None else _half_square(residuals)
    native.codebook_sweep(
        values, base, mix, centroids, _half_square(centroids), residuals, second, codes, errors, isa(), threads()
    )
    return codes, errors


def decode_codebook(
    packed: Tensor, bits: int, centroids: Tensor, residuals: Tensor | None = None, *, rows: int, count: int, group: Tensor | None = None,
    place: Tensor | None = None, affine: tuple[Tensor, Tensor] | None = None, out: Tensor,
) -> Tensor:
    """Codes of ``bits`` bits, ``packed [ceil(rows / v), stride]`` (see `kernels.wide`), into ``out [rows, I]``, float32 or bfloat16.

    ``centroids [G, k, v]``, ``residuals [G, k2, v]`` float32 with ``k k2 = 2^bits``; ``group [count]`` uint8: the book of each code's column (None:
    the first); ``place [count]`` int32: the column of ``out`` it goes to (None: ``count = I``, in order); ``affine``: scale and bias ``[I]`` float32
    of each column. Computed in float32, cast once. Returns ``out``. Raises ValueError for sizes and indices that do not fit.
    """
    check("out", out, (rows, None), (torch.float32, torch.bfloat16))
    check_book(packed, bits, centroids, residuals, rows=rows, columns=out.shape[1], count=count, group=group, place=place, affine=affine)
    size, v = centroids.shape[1:]
    native = extension() if out.device.type == "cpu" else None
    if native is None:
        values = decode_reference(packed, bits, count, centroids, residuals, group, rows)
        to = torch.arange(count, device=out.device) if place is None else place.long()
        if affine is not None:
            values = values * affine[0][to] + affine[1][to]
        out[:, to] = values.to(out.dtype)
        return out
    native.codebook_decode(
        packed, count, bits, size.bit_length() - 1, centroids.view(-1, v), None if residuals is None else residuals.view(-1, v), group,
        place, None if affine is None else affine[0], None if affine is None else affine[1],
        out.view(torch.int16) if out.dtype == torch.bfloat16 else out, threads(),
    )
    return out


def check_book(
    packed: Tensor, bits: int, centroids: Tensor, residuals: Tensor | None, *, rows: int, columns: int, count: int, group: Tensor | None,
    place: Tensor | None, affine: tuple[Tensor, Tensor] | None,
) -> None:
    """Raises ValueError unless codes and books, as `decode_codebook` takes them, fit one another and a matrix ``[rows, columns]``."""
    check("centroids", centroids, (None, None, None), (torch.float32,))
    books, size, v = centroids.shape
    others = 1
    if residuals is not None:
        check("residuals", residuals, (books, None, v), (torch.float32,))
        others = residuals.shape[1]
    if not 1 <= bits <= 24 or size * others != 1 << bits or size & (size - 1) or v < 1:
        raise ValueError(f"bits: {bits}, but the codebooks hold {size} x {others} entries")
    check("packed", packed, (-(-rows // v), packed_stride(count, bits)), (torch.uint8,))
    if group is not None:
        check("group", group, (count,), (torch.uint8,))
        check_range("group", group, 0, books - 1)
    elif not books:
        raise ValueError("centroids: no codebook")
    if place is not None:
        check("place", place, (count,), (torch.int32,))
        check_range("place", place, 0, columns - 1)
    elif count != columns:
        raise ValueError(f"count: {count} codes a row without places, but the matrix has {columns} columns")
    if affine is not None:
        for name, value in zip(("scale", "bias"), affine, strict=True):
            check(name, value, (columns,), (torch.float32,))


def _half_square(centroids: Tensor) -> Tensor:
    return centroids.square().sum(1) / 2


def _check_size(name: str, centroids: Tensor) -> None:
    """Indices are found as float32 numbers, exact up to 2^24."""
    if not 1 <= len(centroids) <= 1 << 24:
        raise ValueError(f"{name}: must hold 1 .. 2^24 vectors, not {len(centroids)}")
