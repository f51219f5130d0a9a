"""Hadamard matrices of many orders, normalised, and fast products with them.

H [n, n] has entries +-1 / sqrt(n) and H H^T = I. An order n is made as a Kronecker product of the smallest matrices there are:

    n = d_1 ... d_r 2^k,     H_n = D_1 x ... x D_r x W,     W_ij = (-1)^popcount(i & j)   (Sylvester; the Walsh-Hadamard transform)

with D_i by Paley (`special.paley`). 576 = 12 x 12 x 4 and 1536 = 12 x 128, for example. **Rows are vectors: y = x H.** H is
symmetric if no factor comes from Paley's first construction (orders 12, 20, 24, ...), so x H and x H^T differ in general; powers of two and
36 and 52 are symmetric. `apply_hadamard` is y = x H, and its inverse is `apply_hadamard(..., transpose=True)`, y = x H^T.

Cost of a product: n (d_1 + ... + d_r + k) additions a row, where the matrix takes n^2. Sources: Sylvester 1867, Paley 1933; as
rotations of language models: Ashkboos et al., QuaRot, 2024 (2404.00456).
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dither.kernels import hadamard_rows
from dither.special.paley import paley, paley_order

NARROW = 16  # columns below which a factor is merged with its neighbour: the widest vectors of the kernel


@functools.cache
def factors(n: int) -> tuple[int, ...]:
    """The orders whose Kronecker product is H_n, in that order: Paley's, largest first, then the power of two if there is one.

    The choice with the smallest sum. ValueError where no known orders multiply to n.
    """
    if n < 1:
        raise ValueError(f"n: must be at least 1, not {n}")
    dense = _dense(n, n)
    if dense is None:
        raise ValueError(f"n: no product of known Hadamard orders is {n}; a random orthogonal matrix does instead")
    power = n // math.prod(dense)
    return (*dense, power) if power > 1 or not dense else dense


def _dense(n: int, largest: int) -> tuple[int, ...] | None:
    """Paley orders, none above ``largest``, that leave a power of two of n; the ones with the smallest sum."""
    if n & (n - 1) == 0:
        return ()
    best: tuple[int, ...] | None = None
    for order in range(4, min(n, largest) + 1, 4):
        if n % order == 0 and order & (order - 1) and paley_order(order) is not None:
            rest = _dense(n // order, order)
            if rest is not None and (best is None or order + sum(rest) < sum(best)):
                best = (order, *rest)
    return best


def hadamard(n: int) -> Tensor:
    """``H [n, n]`` float64 on the CPU, orthogonal. ValueError where n is no product of known orders (see `factors`)."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    for order in factors(n):
        matrix = torch.kron(matrix, _signs(order).double())
    return matrix / math.sqrt(n)


def apply_hadamard(x: Tensor, n: int | None = None, *, transpose: bool = False) -> Tensor:
    """``y = x H_n`` (``transpose``: x H_n^T) for each block of ``n`` along the last dimension of ``x [..., I]``; n = I if not given.

    float32 and bfloat16 on the CPU take the C++ kernel (their gradient too, once), everything else small matrix products. bfloat16 is summed in
    float32; other types in themselves. ValueError where n does not divide I, or has no H.
    """
    size = x.shape[-1] if n is None else n
    orders = factors(size)
    if x.shape[-1] % size:
        raise ValueError(f"n: must divide the last dimension of x, {x.shape[-1]}, which {size} does not")
    if not x.is_floating_point():
        raise ValueError(f"x: must hold floating point numbers, not {x.dtype}")
    rows = x.reshape(-1, size)
    if x.device.type == "cpu" and x.dtype in (torch.float32, torch.bfloat16):
        turned: Tensor = _Rows.apply(rows, orders, transpose)  # type: ignore[no-untyped-call]
        return turned.view(x.shape)
    return _by_factors(rows, orders, transpose).view(x.shape)


class _Rows(torch.autograd.Function):
    """The kernel; what comes back is turned back, since H is orthogonal."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, orders: tuple[int, ...], transpose: bool) -> Tensor:
        ctx.how = orders, transpose
        return hadamard_rows(rows.contiguous(), *_plan(orders, transpose))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        orders, transpose = ctx.how
        return hadamard_rows(gradient.contiguous(), *_plan(orders, not transpose)), None, None


def random_hadamard(n: int, seed: int) -> Tensor:
    """``diag(s) H_n`` float64 with random signs s, so x times it is `apply_hadamard` (x s)."""
    return random_signs(n, seed).double()[:, None] * hadamard(n)


def random_signs(n: int, seed: int) -> Tensor:
    """``[n]`` of +-1, int8: those of `random_hadamard`."""
    return 2 * torch.randint(0, 2, (n,), generator=torch.Generator().manual_seed(seed), dtype=torch.int8) - 1


def random_rotation(n: int, seed: int) -> Tensor:
    """An orthogonal ``[n, n]`` float64 that spreads any axis: `random_hadamard`, or, where no order is known, uniformly random."""
    try:
        return random_hadamard(n, seed)
    except ValueError:
        if n < 1:
            raise
    generator = torch.Generator().manual_seed(seed)
    q, r = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))
    uniform: Tensor = q * r.diagonal().sign()  # over the orthogonal group
    return uniform


def _signs(order: int) -> Tensor:
    """One factor ``[order, order]``, int8."""
    if order & (order - 1):
        return paley(order)
    index = torch.arange(order)
    common = index[:, None] & index[None, :]
    parity = torch.zeros_like(common)
    for bit in range(order.bit_length()):
        parity ^= common >> bit & 1
    return (1 - 2 * parity).to(torch.int8)


@functools.lru_cache(maxsize=64)
def _pieces(orders: tuple[int, ...], transpose: bool, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    """Orthogonal factors; a large power of two as several of at most 64, which is the fast transform in radix 64: as many additions
    as a matrix product can use at no cost, and a pass over memory for six of the transform's levels."""
    sizes: list[int] = []
    for order in orders:
        levels = order.bit_length() - 1
        if order & (order - 1) or levels <= 6:
            sizes.append(order)
        else:
            count = -(-levels // 6)
            sizes += [1 << (levels * (i + 1) // count - levels * i // count) for i in range(count)]
    made = [_signs(size).double() / math.sqrt(size) for size in sizes]
    return tuple((m.mT if transpose else m).to(device, dtype).contiguous() for m in made)


def _by_factors(rows: Tensor, orders: tuple[int, ...], transpose: bool) -> Tensor:
    """``rows [R, n]`` times the Kronecker product, one factor after the other: what torch can differentiate, on any device."""
    compute = torch.float32 if rows.dtype in (torch.bfloat16, torch.float16) else rows.dtype
    y = rows.to(compute)
    inner = rows.shape[1]
    for factor in _pieces(orders, transpose, compute, rows.device):
        m = factor.shape[0]
        inner //= m
        # [R outer, m, inner]; one large product where nothing is inside
        y = y.reshape(-1, m) @ factor if inner == 1 else factor.mT @ y.reshape(-1, m, inner)
    return y.reshape(rows.shape).to(rows.dtype)


@functools.lru_cache(maxsize=64)
def _plan(orders: tuple[int, ...], transpose: bool) -> tuple[tuple[Tensor, ...], int]:
    """Factors as the kernel takes them: matrices of +-1, float32, and the power of two behind them, which is 1 or at least 16.

    A last factor narrower than a vector is merged with the one before it, until it is wide enough or alone.
    """
    power = orders[-1] if orders[-1] & (orders[-1] - 1) == 0 else 1
    dense = [_signs(order).float() for order in (orders[:-1] if power > 1 or orders == (1,) else orders)]
    if power >= NARROW:
        return tuple((m.mT if transpose else m).contiguous() for m in dense), power
    if power > 1 or not dense:
        dense.append(_signs(power).float())
    while len(dense) > 1 and dense[-1].shape[0] < NARROW:
        last = dense.pop()
        dense[-1] = torch.kron(dense[-1], last)
    return tuple((m.mT if transpose else m).contiguous() for m in dense), 1
