"""Nearest centroids, the column sweep, wide bit streams and decoding: every path against definitions in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dither.kernels import decode_codebook, nearest_centroids, pack_rows, pack_wide, sweep_columns, unpack_wide

REAL = [torch.float32, torch.float64]


def drawn(*size: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed + sum(size)), dtype=torch.float64).to(dtype)


def squares(x: Tensor, c: Tensor) -> Tensor:
    return (x.double()[:, None] - c.double()).square().sum(2)


@pytest.mark.parametrize("dtype", REAL, ids=str)
@pytest.mark.parametrize("v", [1, 2, 3, 4, 5, 6, 7, 8, 12, 33])
def test_nearest(path: str, v: int, dtype: torch.dtype) -> None:
    for k in (1, 2, 3, 4, 5, 7, 16, 61):
        for n in (1, 15, 16, 17, 100):
            x, c = drawn(n, v, dtype=dtype), drawn(k, v, dtype=dtype, seed=1)
            found = squares(x, c).gather(1, nearest_centroids(x, c).long()[:, None])[:, 0]
            assert float((found - squares(x, c).min(1).values).max()) <= (1e-5 if dtype == torch.float32 else 1e-13)


def test_the_first_of_equal_centroids(path: str) -> None:
    c = drawn(9, 4)
    for copies in (2, 3, 7):
        again = c.repeat(copies, 1)
        assert torch.equal(nearest_centroids(c, again), torch.arange(9, dtype=torch.int32))


def test_no_vectors(path: str) -> None:
    assert nearest_centroids(torch.zeros(0, 4), torch.zeros(3, 4)).shape == (0,)


def by_definition(
    values: Tensor, mix: Tensor, c: Tensor, r: Tensor | None, base: Tensor | None
) -> tuple[Tensor, Tensor]:
    """One vector and column after the other."""
    v, errors = c.shape[1], torch.zeros_like(values)
    codes = torch.zeros(len(values) // v, values.shape[1], dtype=torch.int32)
    for row in range(len(codes)):
        own = slice(row * v, row * v + v)
        for j in range(values.shape[1]):
            x = values[own, j].clone()
            for i in range(j):
                x += errors[own, i] * mix[j, i]
            a = int((c - x).square().sum(1).argmin())
            q = c[a]
            if r is not None:
                b = int((r - (x - q)).square().sum(1).argmin())
                a, q = a + len(c) * b, q + r[b]
            codes[row, j] = a
            errors[own, j] = q - (x if base is None else base[own, j])
    return codes, errors


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("based", [False, True])
@pytest.mark.parametrize(("v", "rows"), [(1, 19), (3, 5), (4, 17), (7, 2), (9, 3)])
def test_sweep(path: str, v: int, rows: int, residual: bool, based: bool) -> None:
    values, mix = drawn(rows * v, 11), 0.3 * drawn(11, 11)
    c, r = drawn(8, v, seed=2), 0.3 * drawn(4, v, seed=3) if residual else None
    base = drawn(rows * v, 11, seed=4) if based else None
    codes, errors = sweep_columns(values, mix, c, r, base)
    wanted_codes, wanted_errors = by_definition(values, mix, c, r, base)
    assert torch.equal(codes, wanted_codes)
    assert float((errors - wanted_errors).abs().max()) < 1e-12


def test_sweep_reads_only_below_the_diagonal(path: str) -> None:
    values, mix, c = drawn(8, 6), drawn(6, 6), drawn(5, 4)
    poisoned = mix.tril(-1) + torch.full_like(mix, torch.nan).triu()
    assert torch.equal(sweep_columns(values, mix, c)[1], sweep_columns(values, poisoned, c)[1])


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_do_not_matter(path: str, threads: int) -> None:
    values, mix, c = drawn(4 * 61, 20, dtype=torch.float32), 0.2 * drawn(20, 20, dtype=torch.float32), drawn(32, 4, dtype=torch.float32)
    wanted = sweep_columns(values, mix, c)
    torch.set_num_threads(threads)
    found = sweep_columns(values, mix, c)
    assert torch.equal(found[0], wanted[0]) and torch.equal(found[1], wanted[1])


@pytest.mark.parametrize("bits", [1, 5, 7, 8, 9, 12, 13, 16, 20, 23, 24])
def test_wide_streams(bits: int) -> None:
    g = torch.Generator().manual_seed(bits)
    for count in (0, 1, 2, 31, 32, 33, 100):
        codes = torch.randint(0, 1 << bits, (3, count), generator=g, dtype=torch.int32)
        packed = pack_wide(codes, bits)
        assert packed.shape == (3, -(-count * bits // 32) * 4) and torch.equal(unpack_wide(packed, bits, count), codes)
        if bits <= 8:
            assert torch.equal(packed, pack_rows(codes.to(torch.uint8), bits))
        stream = [int(b) >> i & 1 for b in packed[1] for i in range(8)] if count else []
        for j in range(count):  # LSB first
            assert sum(stream[j * bits + i] << i for i in range(bits)) == int(codes[1, j])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("v", "rows", "columns", "k", "k2"), [(4, 8, 20, 256, None), (5, 13, 9, 4096, 16), (1, 3, 1, 2, None), (12, 12, 7, 16, 256)])
def test_decode(path: str, v: int, rows: int, columns: int, k: int, k2: int | None, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(k)
    bits = (k * (k2 or 1)).bit_length() - 1
    for books in (1, 3):
        group = torch.randint(0, books, (columns,), generator=g, dtype=torch.uint8) if books > 1 else None
        codes = torch.randint(0, 1 << bits, (-(-rows // v), columns), generator=g, dtype=torch.int32)
        c = drawn(books, k, v, dtype=torch.float32)
        r = None if k2 is None else drawn(books, k2, v, dtype=torch.float32)
        place = torch.randperm(columns + 2, generator=g)[:columns].to(torch.int32)
        affine = drawn(columns + 2, dtype=torch.float32), drawn(columns + 2, seed=5, dtype=torch.float32)
        wanted = torch.empty(rows, columns)
        for i in range(rows):
            for j in range(columns):
                book = 0 if group is None else int(group[j])
                code = int(codes[i // v, j])
                wanted[i, j] = c[book, code % k, i % v] + (0.0 if r is None else r[book, code // k, i % v])
        packed = pack_wide(codes, bits)
        plain = decode_codebook(
            packed, bits, c, r, rows=rows, count=columns, group=group, out=torch.empty(rows, columns, dtype=dtype)
        )
        assert torch.equal(plain, wanted.to(dtype))
        out = torch.full((rows, columns + 2), 7.0, dtype=dtype)
        decode_codebook(packed, bits, c, r, rows=rows, count=columns, group=group, place=place, affine=affine, out=out)
        to = place.long()
        assert torch.equal(out[:, to], (wanted * affine[0][to] + affine[1][to]).to(dtype))
        assert int((out == 7).sum()) == 2 * rows


def test_wrong_arguments(path: str) -> None:
    x, c = torch.zeros(6, 4), torch.zeros(3, 4)
    codes, book = torch.zeros(2, 8, dtype=torch.uint8), torch.zeros(1, 256, 4)
    out = torch.empty(8, 8)
    calls = [
        ("centroids", lambda: nearest_centroids(x, c[:, :3].contiguous())),
        ("centroids", lambda: nearest_centroids(x, c[:0])),
        ("centroids", lambda: nearest_centroids(x, c.double())),
        ("vectors", lambda: nearest_centroids(x.T, c)),
        ("values", lambda: sweep_columns(x, torch.zeros(4, 4), c)),
        ("mix", lambda: sweep_columns(torch.zeros(4, 4), torch.zeros(4, 3), c)),
        ("base", lambda: sweep_columns(torch.zeros(4, 4), torch.zeros(4, 4), c, base=torch.zeros(4, 3))),
        ("bits", lambda: pack_wide(torch.zeros(1, 1, dtype=torch.int32), 25)),
        ("codes", lambda: pack_wide(torch.full((1, 1), 8, dtype=torch.int32), 3)),
        ("packed", lambda: unpack_wide(torch.zeros(1, 3, dtype=torch.uint8), 8, 3)),
        ("bits", lambda: decode_codebook(codes, 7, book, rows=8, count=8, out=out)),
        ("packed", lambda: decode_codebook(codes[:1], 8, book, rows=8, count=8, out=out)),
        ("count", lambda: decode_codebook(codes[:, :4].contiguous(), 8, book, rows=8, count=4, out=out)),
        ("place", lambda: decode_codebook(codes, 8, book, rows=8, count=8, place=torch.full((8,), 8, dtype=torch.int32), out=out)),
        ("group", lambda: decode_codebook(codes, 8, book, rows=8, count=8, group=torch.ones(8, dtype=torch.uint8), out=out)),
    ]
    for name, call in calls:
        with pytest.raises(ValueError, match=f"^{name}: "):
            call()
