"""Exact identities of GPTQ (Frantar et al., ICLR 2023) that the column loop must satisfy on every path, in float64."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from dither.kernels import gptq_columns
from dither.kernels.gptq import gptq_errors
from kernels.problems import affine_grid, factor, hessian


def weights(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(("columns", "groups", "bits"), [(12, 1, 2), (40, 5, 3), (130, 4, 4)])
def test_loss_is_the_damped_quadratic(path: str, columns: int, groups: int, bits: int) -> None:
    """``(w - q) H (w - q)^T = sum e^2`` for every row, since ``W - Q = E U`` and ``U H U^T = I``."""
    w, h = weights(20, columns), hessian(columns, 1)
    grid, group = affine_grid(w, groups, bits)
    codes, loss, errors = gptq_errors(w, factor(h), group, grid)
    d = w - grid.decode(codes, group)
    torch.testing.assert_close(((d @ h) * d).sum(1), 2 * loss, rtol=1e-9, atol=0)
    torch.testing.assert_close(errors @ factor(h), d, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("diagonal", [torch.full((50,), 0.37), torch.logspace(-6, 6, 50)])
def test_uncorrelated_inputs_give_plain_rounding(path: str, diagonal: Tensor) -> None:
    w = weights(33, 50)
    grid, group = affine_grid(w, 3, 3)
    codes, _ = gptq_columns(w, factor(torch.diag(diagonal.double())), group, grid)
    assert torch.equal(codes, grid.encode(w, group))
    codes, _ = gptq_columns(w.float(), factor(torch.diag(diagonal.double())).float(), group, grid)
    assert torch.equal(codes, grid.to(torch.float32).encode(w.float(), group))


def test_block_size_does_not_matter(path: str) -> None:
    w, u = weights(24, 300), factor(hessian(300, 2))
    grid, group = affine_grid(w, 5, 3)
    expected, _ = gptq_columns(w, u, group, grid, block=1)
    for block in (8, 128, 300):
        assert torch.equal(gptq_columns(w, u, group, grid, block=block)[0], expected)


@pytest.mark.parametrize("columns", [12, 97])
def test_ldlq_gives_the_same_integers(path: str, columns: int) -> None:
    """QuIP's form: ``q_c = Round(w_c + (w_<c - q_<c) N_<c,c)`` with ``H = (I + N) D (I + N)^T``, N strictly upper."""
    w, h = weights(30, columns), hessian(columns, 3)
    grid, group = affine_grid(w, 4, 3)
    a = torch.linalg.inv(factor(h))
    n = a / a.diagonal() - torch.eye(columns, dtype=a.dtype)
    unit = n + torch.eye(columns, dtype=a.dtype)
    torch.testing.assert_close(unit @ torch.diag(a.diagonal().square()) @ unit.T, h, rtol=1e-8, atol=1e-8)
    q, codes = torch.zeros_like(w), torch.zeros(w.shape, dtype=torch.uint8)
    for c in range(columns):
        target = w[:, c] + (w[:, :c] - q[:, :c]) @ n[:c, c]
        codes[:, c] = grid.encode(target, int(group[c]))
        q[:, c] = grid.decode(codes[:, c], int(group[c]))
    assert torch.equal(gptq_columns(w, factor(h), group, grid)[0], codes)


def test_each_column_is_rounded_from_the_exact_minimiser(path: str) -> None:
    """With the columns before c fixed at q, the value that column c is rounded from minimises the quadratic over all
    later ones.
    """
    w, h = weights(9, 12), hessian(12, 4)
    u = factor(h)
    grid, group = affine_grid(w, 2, 2)
    codes, _, errors = gptq_errors(w, u, group, grid)
    q = grid.decode(codes, group)
    root = torch.linalg.cholesky(h).T  # ||root d||^2 = d^T H d
    for c in range(1, 12):
        # minimise over v: || root[:, :c] (w - q)_<c + root[:, c:] (w_c.. - v) ||
        fixed = (w[:, :c] - q[:, :c]) @ root[:, :c].T
        step = torch.linalg.lstsq(root[:, c:], fixed.T).solution.T  # v - w_c..
        torch.testing.assert_close(q[:, c] + errors[:, c] * u[c, c], w[:, c] + step[:, 0], rtol=1e-8, atol=1e-9)


def test_between_the_optimum_and_plain_rounding(path: str) -> None:
    """Never below the best of all grids; below plain rounding in most of 200 random problems (not in all: it is
    greedy).
    """
    better, total = 0, 0
    for columns, seed in itertools.product(range(2, 7), range(8)):
        w, h = weights(5, columns, seed), hessian(columns, seed)
        grid, group = affine_grid(w, 1, 2)
        _, loss = gptq_columns(w, factor(h), group, grid)
        every = torch.cartesian_prod(*[torch.arange(4, dtype=torch.uint8)] * columns)  # (4^I, I)
        for r in range(5):
            d = w[r] - grid.scale[r] * (every.double() - grid.zero[r])
            losses = ((d @ h) * d).sum(1) / 2
            plain = w[r] - grid.decode(grid.encode(w, group), group)[r]
            assert float(loss[r]) >= float(losses.min()) * (1 - 1e-9)
            better += float(loss[r]) <= float(plain @ h @ plain) / 2 * (1 + 1e-9)
            total += 1
    assert total == 200
    assert better > 150
