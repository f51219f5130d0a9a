"""VPTQ's column pass: the paper's exact identities, refinement against dense least squares, and what is refused."""

from __future__ import annotations

import itertools
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from dither import kernels
from dither.formats import Codebook, Int, QTensor, channel, tensor
from dither.kernels import AffineGrid
from dither.quant.rounding.columns import damped_inverse_factor
from dither.quant.rounding.vector_columns import VectorColumns, _Part, _Problem, vector_columns
from dither.quant.statistics import HESSIAN, Statistics

GENERAL = [
    Codebook(4, 16),
    Codebook(3, 16, 8),
    Codebook(5, 8, groups=3),
    Codebook(4, 16, 4, groups=2, outlier_percent=7.0, outlier=(2, 32)),
    Codebook(4, 16, norm=True),
    Codebook(3, 16, groups=2, outlier_percent=5.0, outlier=(4, 8), norm=True),
]


def problem(rows: int = 32, columns: int = 40, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight and the Hessian of correlated inputs of many sizes, float64."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(4 * columns, columns, generator=g, dtype=torch.float64)
    x = x @ torch.randn(columns, columns, generator=g, dtype=torch.float64) * torch.logspace(-0.5, 1, columns)
    return torch.randn(rows, columns, generator=g, dtype=torch.float64), x.T @ x / len(x)


def cost(weight: Tensor, found: QTensor | Tensor, hessian: Tensor) -> float:
    """tr(D H D^T)."""
    d = (found.dequantize(torch.float64) if isinstance(found, QTensor) else found) - weight
    return float(((d @ hessian) * d).sum())


def damped(hessian: Tensor, damp: float = 0.01) -> Tensor:
    return hessian + damp * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=torch.float64)


# -- identities ------------------------------------------------------------------------------------------------------------


def test_enough_centroids_are_exact() -> None:
    """k no smaller than the number of distinct vectors: nothing is lost, whatever the Hessian."""
    g = torch.Generator().manual_seed(0)
    entries = torch.randn(30, 4, generator=g).half().float()
    index = torch.randint(30, (8, 40), generator=g)
    weight = entries[index].transpose(1, 2).reshape(32, 40)
    for knobs in ({}, {"refine": 2}, {"compensate": False}, {"perm": False, "init": "spread"}):
        found = vector_columns(weight, problem()[1], Codebook(4, 32), **knobs)
        assert torch.equal(found.dequantize(), weight)


def test_the_identity_changes_nothing() -> None:
    """H = I: no error has anywhere to go, so each vector goes to its nearest centroid."""
    weight, _ = problem()
    scheme = Codebook(4, 16)
    found = vector_columns(weight, torch.eye(40), scheme)
    centroids = found.stored["centroids"][0].double()
    vectors = weight.view(8, 4, 40).transpose(1, 2)  # (R, N, v)
    nearest = (vectors[:, :, None] - centroids).square().sum(3).argmin(2)
    assert torch.equal(scheme.codes(found.stored, found.shape).long(), nearest)
    assert torch.equal(found.dequantize(), vector_columns(weight, torch.eye(40), scheme, compensate=False).dequantize())


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_single_weights_on_a_grid_are_gptq(bits: int) -> None:
    """v = 1 and the points of a per-tensor grid as codebook: the codes of GPTQ's loop, all of them."""
    weight, hessian = problem(24, 48)
    order = hessian.diagonal().argsort(descending=True)
    upper, _ = damped_inverse_factor(hessian, 0.01, order)
    scheme = Int(bits, sym="full", scale="float32") @ tensor()
    params = scheme.fit(weight)
    grid = scheme.format.column_grid({k: v.double() for k, v in params.items()})
    assert isinstance(grid, AffineGrid)
    wide = AffineGrid(grid.scale.expand(24, 1).contiguous(), grid.zero.expand(24, 1).contiguous(), grid.code_max)
    work = weight[:, order].contiguous()
    wanted, loss = kernels.gptq_columns(work, upper.contiguous(), torch.zeros(48, dtype=torch.int64), wide)
    points = ((torch.arange(1 << bits, dtype=torch.float64) - wide.zero[0, 0]) * wide.scale[0, 0])[:, None].contiguous()
    mix = (upper / upper.diagonal()[:, None]).T.contiguous()
    found, errors = kernels.sweep_columns(work, mix, points)
    assert torch.equal(found, wanted.to(torch.int32))
    assert float((errors / upper.diagonal()).square().sum()) / 2 == pytest.approx(float(loss.sum()), rel=1e-10)


@pytest.mark.parametrize("scheme", GENERAL, ids=str)
def test_permuting_inputs_permutes_the_result(scheme: Codebook) -> None:
    weight, hessian = problem()
    p = torch.randperm(40, generator=torch.Generator().manual_seed(3))
    plain = vector_columns(weight, hessian, scheme, refine=1).dequantize()
    shuffled = vector_columns(weight[:, p], hessian[p[:, None], p], scheme, refine=1).dequantize()
    assert float((shuffled - plain[:, p]).abs().max()) < 1e-6


@pytest.mark.parametrize("knobs", [{}, {"perm": False}, {"refine": 2}, {"compensate": False}], ids=str)
@pytest.mark.parametrize("scheme", GENERAL, ids=str)
def test_what_is_stored_has_the_loss_that_was_seen(scheme: Codebook, knobs: dict[str, Any]) -> None:
    """Indices back in natural order decode to the matrix of the pass: its damped loss is the stored one's."""
    weight, hessian = problem(30)
    rounded = VectorColumns(**knobs).solve(weight, hessian, scheme)
    metric = damped(hessian)
    if scheme.norm:  # damping is of the normalised problem
        s = rounded.tensor.stored["column_scale"].double()
        metric = hessian + 0.01 * (hessian.diagonal() * s * s).mean() * torch.diag(1 / (s * s))
    wanted = float(((rounded.tensor.dequantize(torch.float64) - weight) @ metric * (rounded.tensor.dequantize(torch.float64) - weight)).sum()) / 2
    assert rounded.loss == pytest.approx(wanted, rel=1e-5)
    scheme.check_stored(rounded.tensor.stored, rounded.tensor.shape)


def test_the_loop_is_gptqs_with_vectors() -> None:
    """Against the spec's steps, one column after the other, with the codebook that was stored."""
    weight, hessian = problem()
    scheme = Codebook(4, 16, 8)
    found = vector_columns(weight, hessian, scheme)
    main, second = (found.stored[k][0].double() for k in ("centroids", "residuals"))
    order = hessian.diagonal().argsort(descending=True)
    h = damped(hessian)[order[:, None], order]
    upper = torch.linalg.cholesky(torch.linalg.inv(h), upper=True)
    work, wanted = weight[:, order].clone(), torch.empty(32, 40, dtype=torch.float64)
    for j in range(40):
        x = work[:, j].view(8, 4)
        q = main[(x[:, None] - main).square().sum(2).argmin(1)]
        q = q + second[(x[:, None] - q[:, None] - second).square().sum(2).argmin(1)]
        wanted[:, order[j]] = q.reshape(-1)
        e = (work[:, j] - q.reshape(-1)) / upper[j, j]
        work[:, j + 1 :] -= e[:, None] * upper[j, j + 1 :]
    assert float((found.dequantize(torch.float64) - wanted).abs().max()) < 1e-6


# -- errors fall ------------------------------------------------------------------------------------------------------------


def test_each_idea_helps() -> None:
    plain = weighted = full = with_residual = 0.0
    for seed in range(3):
        weight, hessian = problem(64, 48, seed)
        plain += cost(weight, vector_columns(weight, hessian, Codebook(4, 16), weighted=False, compensate=False), hessian)
        weighted += cost(weight, vector_columns(weight, hessian, Codebook(4, 16), compensate=False), hessian)
        one = cost(weight, vector_columns(weight, hessian, Codebook(4, 16)), hessian)
        two = cost(weight, vector_columns(weight, hessian, Codebook(4, 16, 4)), hessian)
        assert two <= one  # a residual pass never raises the error
        full, with_residual = full + one, with_residual + two
    assert with_residual < full < weighted < plain and full < 0.75 * weighted


@pytest.mark.parametrize("scheme", GENERAL, ids=str)
def test_refinement_never_raises_the_loss(scheme: Codebook) -> None:
    weight, hessian = problem(34)  # vectors that reach past the last row
    losses = [VectorColumns(refine=n).solve(weight, hessian, scheme).loss for n in (0, 1, 2, 5, 12)]
    assert all(b <= a * (1 + 1e-12) for a, b in itertools.pairwise(losses)) and losses[-1] < 0.97 * losses[0]


def instance(v: int, k: int, k2: int, rows: int) -> tuple[_Problem, Tensor]:
    weight, hessian = problem(rows, 20)
    g = torch.Generator().manual_seed(1)
    part = _Part(slice(0, 20), v, k, k2, False)
    part.books = [torch.randn(size, v, generator=g, dtype=torch.float64) for size in (k, k2) if size]
    part.codes = torch.randint(0, k * max(1, k2), (-(-rows // v), 20), generator=g, dtype=torch.int32)
    return _Problem(weight, damped(hessian), torch.ones(20), [part]), hessian


@pytest.mark.parametrize(("v", "k", "k2", "rows"), [(4, 8, 0, 24), (3, 4, 4, 24), (4, 8, 0, 22)])
def test_centroids_are_the_dense_least_squares(v: int, k: int, k2: int, rows: int) -> None:
    """argmin_C tr(D H D^T), with the design matrix written out: rows and columns of W against all centroid entries."""
    made, _ = instance(v, k, k2, rows)
    part = made.parts[0]
    root = torch.linalg.cholesky(made.metric)  # |D root|^2 = tr(D H D^T)
    sizes = [b.numel() for b in part.books]
    design = torch.zeros(rows, 20, sum(sizes), dtype=torch.float64)
    for number, index in part.indices():
        for i in range(rows):
            for j in range(20):
                design[i, j, sum(sizes[:number]) + int(index[i // v, j]) * v + i % v] = 1
    matrix = torch.einsum("ijc,jl->ilc", design, root).reshape(rows * 20, -1)
    goal = (made.target @ root).reshape(-1)
    solved = torch.linalg.lstsq(matrix, goal, driver="gelsd").solution
    best = float((matrix @ solved - goal).square().sum())
    made._centroids()
    assert best <= made.loss() <= best * (1 + 1e-4)  # the books are float16


def test_refined_indices_cannot_be_bettered_one_by_one() -> None:
    made, _ = instance(4, 8, 0, 24)
    losses = [made.refine() for _ in range(40)]
    assert losses[-1] == losses[-2]
    part, best = made.parts[0], made.loss()
    assert part.codes is not None
    for r in range(6):
        for j in range(20):
            old = int(part.codes[r, j])
            for c in range(8):
                part.codes[r, j] = c
                assert made.loss() >= best * (1 - 1e-12)
            part.codes[r, j] = old


# -- edges ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", GENERAL, ids=str)
def test_dead_columns_give_zeros(scheme: Codebook) -> None:
    weight, hessian = problem()
    for j in (3, 17, 39):
        hessian[j] = hessian[:, j] = 0
    for knobs in ({}, {"refine": 2}, {"compensate": False}):
        found = vector_columns(weight, hessian, scheme, **knobs).dequantize()
        assert not bool(found[:, [3, 17, 39]].any()) and bool(found[:, 0].any())


def test_constant_columns_survive_normalising() -> None:
    weight, hessian = problem()
    weight[:, 5] = 0.75
    found = vector_columns(weight, hessian, Codebook(4, 16, norm=True)).dequantize()
    assert bool(torch.isfinite(found).all())


def test_repeats_to_the_bit() -> None:
    weight, hessian = problem()
    a, b = (vector_columns(weight.float(), hessian, GENERAL[3], refine=2) for _ in range(2))
    assert all(torch.equal(a.stored[k], b.stored[k]) for k in a.stored)
    other = vector_columns(weight.float(), hessian, GENERAL[3], refine=2, seed=1)
    assert not torch.equal(other.stored["centroids"], a.stored["centroids"])


def test_without_inputs_it_is_plain_and_says_so() -> None:
    weight, _ = problem()
    scheme = Codebook(4, 16)
    rounded = VectorColumns().round(weight.float(), scheme, {}, None)
    assert rounded.fallback == "plain vector quantization: 0 calibration tokens"
    plain = vector_columns(weight.float(), torch.eye(40), scheme, perm=False, weighted=False, compensate=False)
    assert torch.equal(rounded.tensor.dequantize(), plain.dequantize()) and bool(plain.dequantize().any())


def test_layers_that_share_inputs_share_the_factor(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def counted(*arguments: Any) -> Any:
        calls.append(1)
        return damped_inverse_factor(*arguments)

    monkeypatch.setattr(sys.modules[VectorColumns.__module__], "damped_inverse_factor", counted)
    statistics = Statistics(40, frozenset({HESSIAN}))
    statistics.update(torch.randn(200, 40, generator=torch.Generator().manual_seed(0)))
    weight = problem()[0].float()
    shared = [VectorColumns().round(weight, Codebook(4, 16), {}, statistics) for _ in range(3)]
    assert len(calls) == 1 and shared[0].damp == 0.01
    alone = vector_columns(weight, statistics.hessian, Codebook(4, 16))
    assert torch.equal(shared[2].tensor.dequantize(), alone.dequantize())


def test_large_books_are_told(caplog: pytest.LogCaptureFixture) -> None:
    weight, hessian = problem()
    for _ in range(2):
        vector_columns(weight, hessian, Codebook(4, 256), kmeans_iters=1)
    assert [r.message for r in caplog.records] == [
        "the books of a codebook of 256 vectors of 4 hold 80 % as many numbers as its 32 x 40 weights"
    ]


def test_wrong_arguments() -> None:
    weight, hessian = problem()
    lopsided = hessian.clone()
    lopsided[0, 1] += 100
    for name, call in [
        ("hessian", lambda: vector_columns(weight, hessian[:10, :10], Codebook(4, 16))),
        ("hessian", lambda: vector_columns(weight, hessian * torch.nan, Codebook(4, 16))),
        ("hessian", lambda: vector_columns(weight, lopsided, Codebook(4, 16))),
        ("scheme", lambda: vector_columns(weight, hessian, Int(4) @ channel())),  # type: ignore[arg-type]
        ("vector", lambda: vector_columns(weight, hessian, Codebook(33, 16))),
        ("damp", lambda: VectorColumns(damp=0)),
        ("refine", lambda: VectorColumns(refine=-1)),
        ("kmeans_iters", lambda: VectorColumns(kmeans_iters=0)),
        ("init", lambda: VectorColumns(init="best")),
    ]:
        with pytest.raises(ValueError, match=f"^{name}"):
            call()
