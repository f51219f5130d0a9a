"""Weighted k-means against Lloyd's algorithm as written."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from dither.quant.kmeans import weighted_kmeans


def drawn(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def objective(x: Tensor, w: Tensor, c: Tensor) -> float:
    return float((w * (x[:, None] - c).square().sum(2).min(1).values).sum())


@pytest.mark.parametrize("init", ["random", "spread"])
def test_one_iteration_is_lloyds(init: str) -> None:
    x, w = drawn(200, 3), drawn(200, seed=1).abs()
    start = weighted_kmeans(x, w, 10, iterations=0, init=init).centroids
    a = (x[:, None] - start).square().sum(2).argmin(1)
    wanted = torch.stack([(w[a == c, None] * x[a == c]).sum(0) / w[a == c].sum() if bool((a == c).any()) else start[c] for c in range(10)])
    found = weighted_kmeans(x, w, 10, iterations=1, init=init)
    assert float((found.centroids - wanted).abs().max()) < 1e-12
    assert found.losses[0] == pytest.approx(objective(x, w, start), rel=1e-10)


@pytest.mark.parametrize("init", ["random", "spread"])
def test_the_objective_falls_to_a_fixed_point(init: str) -> None:
    x, w = drawn(300, 2), drawn(300, seed=1).square()
    found = weighted_kmeans(x, w, 12, iterations=500, tolerance=0, init=init)
    assert all(b <= a * (1 + 1e-12) for a, b in itertools.pairwise(found.losses))
    c, a = found.centroids, (x[:, None] - found.centroids).square().sum(2).argmin(1)
    for i in a.unique().tolist():
        mean = (w[a == i, None] * x[a == i]).sum(0) / w[a == i].sum()
        assert float((mean - c[i]).abs().max()) < 1e-10
    assert objective(x, w, c) == pytest.approx(found.losses[-1], rel=1e-9)


def test_weights_are_repetitions() -> None:
    x, w = drawn(40, 2), torch.randint(1, 4, (40,), generator=torch.Generator().manual_seed(0)).double()
    repeated = x.repeat_interleave(w.long(), 0)
    c = weighted_kmeans(x, w, 5).centroids
    assert objective(x, w, c) == pytest.approx(objective(repeated, torch.ones(len(repeated)), c), rel=1e-12)


@pytest.mark.parametrize("init", ["random", "spread"])
def test_few_distinct_vectors_are_kept_as_they_are(init: str) -> None:
    distinct = drawn(7, 4).float()
    x = distinct[torch.randint(7, (500,), generator=torch.Generator().manual_seed(0))]
    for k in (7, 8, 64):
        found = weighted_kmeans(x, None, k, init=init)
        assert len(found.centroids) == k and objective(x, torch.ones(500), found.centroids) == 0
    assert weighted_kmeans(x, None, 3, init=init).losses[-1] > 0


def test_without_weight_a_centroid_stays() -> None:
    x = torch.tensor([[0.0], [1.0], [10.0], [11.0], [50.0]])
    w = torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0])
    found = weighted_kmeans(x, w, 2, init="spread")
    assert sorted(found.centroids[:, 0].tolist()) == [0.5, 10.5]
    assert torch.isfinite(weighted_kmeans(drawn(50, 2), torch.zeros(50), 4).centroids).all()


def test_same_seed_same_centroids_whatever_the_threads() -> None:
    x, w = drawn(3000, 4).float(), drawn(3000, seed=1).abs()
    found = weighted_kmeans(x, w, 32, seed=5).centroids
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(weighted_kmeans(x, w, 32, seed=5).centroids, found)
    finally:
        torch.set_num_threads(before)
    assert not torch.equal(weighted_kmeans(x, w, 32, seed=6).centroids, found)


def test_wrong_arguments() -> None:
    x = torch.zeros(5, 2)
    for name, call in [
        ("x", lambda: weighted_kmeans(x[:0], None, 2)),
        ("weight", lambda: weighted_kmeans(x, torch.full((5,), -1.0), 2)),
        ("weight", lambda: weighted_kmeans(x, torch.ones(4), 2)),
        ("k", lambda: weighted_kmeans(x, None, 0)),
        ("init", lambda: weighted_kmeans(x, None, 2, init="best")),
    ]:
        with pytest.raises(ValueError, match=f"^{name}"):
            call()
