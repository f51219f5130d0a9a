"""Sparse transforms as a whole: recovery in every mode, identities, unknown K and noise, what is asked of f, and wrong arguments."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from dither.special import SparseWHT, fwht, sparse_wht
from dither.special.spright.gf2 import signs
from special.sparse_signals import signal


@pytest.mark.parametrize(
    ("n", "k", "snr", "given"),
    [
        (16, 64, None, {}),
        (18, 40, None, {"hashing": "block"}),
        (16, 64, None, {"hashing": "overlap"}),
        (16, 64, 5, {"mode": "nso"}),
        (16, 64, 5, {"mode": "so"}),
        (13, 32, 8, {"mode": "ml"}),
        (16, 64, 5, {"mode": "nso", "sigma": None}),
        (16, 64, 5, {"mode": "so", "sigma": None}),
        (16, 64, 5, {"mode": "so", "groups": 4, "eta": 0.7}),
    ],
)
@pytest.mark.parametrize("kind", ["signs", "complex"])
def test_recovery(n: int, k: int, snr: float | None, given: dict[str, Any], kind: str) -> None:
    exact, complete = 0, 0
    for seed in range(4):
        s = signal(n, k, snr, seed, kind)
        found = sparse_wht(s.f, k=k, seed=seed, **({"sigma": s.sigma} | given))
        exact += s.exact(found)
        complete += found.complete
        assert s.recall(found) > 0.9 and found.n_queries <= found.n_calls < len(s.f)
        assert found.residual == pytest.approx(s.sigma, rel=0.2, abs=1e-12) or not found.complete
        if snr is not None and found.complete:
            assert found.sigma == pytest.approx(s.sigma, rel=0.1)
            both = np.array([dict(zip(s.support.tolist(), s.values, strict=True)).get(i, 0) for i in found.support.tolist()])
            assert np.abs(found.values - both).max() < 0.1 + 5 * s.sigma / np.sqrt(found.n_queries)
    assert exact >= 3 and complete >= 3


@pytest.mark.slow
def test_the_papers_kind_of_figures() -> None:
    """n = 20, K = 100: without noise and at 10 dB, 50 runs each."""
    runs = {mode: [(signal(20, 100, None if mode == "noiseless" else 10, seed)) for seed in range(50)] for mode in ("noiseless", "nso", "so")}
    found = {m: [sparse_wht(s.f, k=100, sigma=s.sigma, mode=m, seed=i) for i, s in enumerate(rs)] for m, rs in runs.items()}
    exact = {m: np.mean([s.exact(x) for s, x in zip(runs[m], found[m], strict=True)]) for m in runs}
    assert exact["noiseless"] >= 0.95 and exact["nso"] >= 0.95
    assert max(x.n_queries for x in found["noiseless"]) <= 0.01 * 2**20
    assert np.mean([s.recall(x) for s, x in zip(runs["so"], found["so"], strict=True)]) >= 0.99
    assert max(x.n_queries for x in found["so"]) <= 0.45 * min(x.n_queries for x in found["nso"])


def sixty_bits(k: int = 40) -> tuple[np.ndarray, np.ndarray, Any]:
    g = np.random.default_rng(0)
    support, values = g.integers(0, 1 << 60, k, dtype=np.uint64), g.choice([-1.0, 2.0], k)
    return support, values, lambda m: signs(m, support) @ values


def test_a_function_that_no_table_holds() -> None:
    support, _, f = sixty_bits()
    found = sparse_wht(f, n=60, k=40, seed=1)
    assert found.complete and set(found.support.tolist()) == set(support.tolist()) and found.n_queries < 15000
    m = np.random.default_rng(1).integers(0, 1 << 60, 100, dtype=np.uint64)
    np.testing.assert_allclose(found(m), f(m), atol=1e-12)
    np.testing.assert_allclose(found((m[:, None] >> np.arange(60, dtype=np.uint64)) & np.uint64(1)), f(m), atol=1e-12)
    by_bits = sparse_wht(lambda rows: f(rows.astype(np.uint64) @ (np.uint64(1) << np.arange(60, dtype=np.uint64))), 60, 40, seed=1, bits=True)
    assert np.array_equal(by_bits.support, found.support) and np.array_equal(by_bits.values, found.values)
    noise = np.random.default_rng(2)
    noisy = sparse_wht(lambda m: f(m) + 0.5 * noise.standard_normal(len(m)), n=60, k=40, sigma=0.5, mode="so", seed=1)
    assert noisy.complete and set(noisy.support.tolist()) == set(support.tolist())


@pytest.mark.parametrize(("n", "degree", "snr"), [(40, 2, None), (60, 3, None), (40, 2, 10.0), (24, 3, 10.0)])
def test_low_degrees_take_fewer_samples(n: int, degree: int, snr: float | None) -> None:
    g = np.random.default_rng(1)
    masks = {sum(1 << int(i) for i in g.choice(n, int(c), replace=False)) for c in g.integers(0, degree + 1, 30)}
    support, values = np.array(sorted(masks), dtype=np.uint64), g.choice([-1.0, 1.0], len(masks))
    sigma = 0.0 if snr is None else float(np.sqrt(len(masks) / 10 ** (snr / 10)))

    def f(m: np.ndarray) -> np.ndarray:
        noise = np.array([np.random.default_rng(int(i)).standard_normal() for i in m]) if sigma else 0.0
        found: np.ndarray = signs(m, support) @ values + sigma * noise
        return found

    found = sparse_wht(f, n, 32, sigma, degree=degree)
    assert found.mode == "low_degree" and found.complete and set(found.support.tolist()) == masks
    assert np.abs(found(support) - signs(support, support) @ values).max() <= (0.5 if sigma else 1e-9)
    other = sparse_wht(f, n, 32, sigma)
    assert set(other.support.tolist()) == masks
    assert found.n_queries <= 1.01 * (1 + degree * n.bit_length()) / (n + 1) * other.n_queries


@pytest.mark.parametrize("sigma", [0.0, 1.0, None])
def test_unknown_k(sigma: float | None) -> None:
    """Bins grow until peeling goes through, and keep the samples they have."""
    s = signal(18, 200, None, 0)
    f = s.f if sigma == 0 else s.f + np.random.default_rng(1).standard_normal(len(s.f))
    found = sparse_wht(f, sigma=sigma)
    assert s.exact(found) and found.complete and found.bins in (3 * 128, 3 * 256)
    assert found.n_calls <= 1.1 * sparse_wht(f, k=found.bins // 3, sigma=sigma).n_calls
    capped = sparse_wht(f, sigma=sigma, max_queries=1)
    assert capped.bins == 3 * 64 and not s.exact(capped)


def test_pure_noise_has_no_coefficients() -> None:
    f = np.random.default_rng(0).standard_normal(1 << 14)
    for mode in ("nso", "so"):
        found = sparse_wht(f, k=32, sigma=1.0, mode=mode)
        assert len(found.support) == 0 and found.complete and found.residual == pytest.approx(1, rel=0.1)
    nothing = sparse_wht(np.zeros(1 << 10), k=4)
    assert len(nothing.support) == 0 and nothing.complete and nothing.residual == 0
    assert nothing(np.arange(3)).tolist() == [0, 0, 0] and sparse_wht(np.zeros(1 << 10)).complete


def test_failure_is_told() -> None:
    s = signal(14, 400, None, 0)
    found = sparse_wht(s.f, k=32)
    assert not found.complete and found.unresolved > 0 and not s.exact(found) and found.residual > 1


def test_linearity_and_constants() -> None:
    """a f + c has a X, and c more at 0, from the same samples."""
    s = signal(14, 30, None, 3, "normal")
    f = s.f - s.f.mean()
    one, two = sparse_wht(f, k=30, seed=2), sparse_wht(-3 * f + 5, k=31, seed=2)
    assert one.complete and two.complete and one.n_queries == two.n_queries
    np.testing.assert_allclose(two.to_dense()[1:], -3 * one.to_dense()[1:], atol=1e-12)
    assert two.to_dense()[0] == pytest.approx(5, abs=1e-12)


def test_parseval_and_the_dense_form() -> None:
    s = signal(12, 20, None, 0, "normal")
    found = sparse_wht(s.f, k=20)
    assert (found.values**2).sum() == pytest.approx((s.f**2).mean(), rel=1e-12)
    np.testing.assert_allclose(fwht(found.to_dense()), s.f, atol=1e-12)
    assert list(np.abs(found.values)) == sorted(np.abs(found.values), reverse=True)
    assert (found.bits() @ (1 << np.arange(12))).tolist() == found.support.tolist()


def test_the_same_seed_gives_the_same_and_another_other_samples() -> None:
    s = signal(14, 30, 10, 0)
    one, two, other = (sparse_wht(s.f, k=30, sigma=s.sigma, seed=seed) for seed in (7, 7, 8))
    assert np.array_equal(one.values, two.values) and one.n_queries == two.n_queries
    assert not np.array_equal(one.groups[0].masks(), other.groups[0].masks())


def test_approximate_sparsity() -> None:
    """Small coefficients everywhere are noise to the estimate: the large ones are found with their values."""
    g = np.random.default_rng(0)
    dense = 0.002 * g.standard_normal(1 << 14)
    support = g.choice(1 << 14, 20, replace=False)
    dense[support] = g.choice([-1.0, 1.0], 20)
    found = sparse_wht(fwht(dense), k=20, sigma=None, mode="so")
    assert set(found.support.tolist()) == set(support.tolist())
    assert np.abs(found.to_dense()[support] - dense[support]).max() < 0.02
    assert found.sigma == pytest.approx(0.002 * 128, rel=0.15)


def test_a_drop_of_energy_peels_what_is_sparse_only_roughly() -> None:
    """Coefficients that fall off as rank^-0.6: no bin is ever down to noise."""
    g = np.random.default_rng(0)
    dense = np.zeros(1 << 18)
    dense[g.choice(1 << 18, 8000, replace=False)] = g.choice([-1.0, 1.0], 8000) / np.arange(1, 8001) ** 0.6
    f = fwht(dense)
    found = {drop: sparse_wht(f, k=256, sigma=None, mode="nso", drop=drop) for drop in (0.0, 0.5, None)}
    left = {drop: ((dense - x.to_dense()) ** 2).sum() for drop, x in found.items()}
    best = np.sort(dense**2)[:-256].sum()  # what the 256 largest leave
    assert left[0.5] < 1.3 * best and left[0.5] < 0.8 * left[0.0]
    assert left[None] == left[0.5]  # where noise is to be estimated


F = np.zeros(1 << 10)


@pytest.mark.parametrize(
    ("name", "f", "given"),
    [
        ("n", lambda m: m, {}),
        ("n", lambda m: m, {"n": 0}),
        ("n", lambda m: m, {"n": 64}),
        ("n", F, {"n": 11}),
        ("f", F[:1000], {}),
        ("f", F[:1], {}),
        ("f", F.reshape(2, -1), {}),
        ("f", lambda m: np.zeros(3), {"n": 10}),
        ("f", lambda m: m[:, None] * 1.0, {"n": 10}),
        ("f", lambda m: np.full(len(m), np.nan), {"n": 10}),
        ("f", lambda m: np.full(len(m), np.inf), {"n": 10}),
        ("f", lambda m: np.full(len(m), "x"), {"n": 10}),
        ("k", F, {"k": 0}),
        ("k", F, {"k": 257}),
        ("sigma", F, {"sigma": -1.0}),
        ("sigma", F, {"sigma": float("nan")}),
        ("mode", F, {"mode": "best"}),
        ("mode", lambda m: m, {"mode": "ml", "n": 21, "k": 4}),
        ("degree", F, {"mode": "low_degree"}),
        ("degree", F, {"mode": "so", "degree": 1}),
        ("degree", F, {"degree": 0}),
        ("degree", F, {"degree": 3}),
        ("hashing", F, {"hashing": "none"}),
        ("hashing", F, {"hashing": "block", "k": 64}),
        ("groups", F, {"groups": 0}),
        ("eta", F, {"eta": 0.0}),
        ("p1", F, {"p1": 0, "mode": "so"}),
        ("p1", F, {"p1": 2000, "mode": "nso", "k": 4}),
        ("gamma", F, {"gamma": 0.0}),
        ("drop", F, {"drop": 1.0}),
        ("rounds", F, {"rounds": 0}),
        ("max_queries", F, {"max_queries": 0}),
    ],
)
def test_wrong_arguments(name: str, f: Any, given: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=rf"^{name}: "):
        sparse_wht(f, **given)


def test_wrong_kinds() -> None:
    with pytest.raises(TypeError, match=r"^f: "):
        sparse_wht([1.0, 2.0])  # type: ignore[arg-type]
    found: SparseWHT = sparse_wht(F, k=4)
    for masks in (np.zeros(3), np.zeros((3, 4), dtype=int)):
        with pytest.raises(ValueError, match=r"^masks: "):
            found(masks)
    with pytest.raises(ValueError, match=r"^n: 60 bits"):
        sparse_wht(sixty_bits(4)[2], 60, 4).to_dense()
    assert found(np.zeros(0, dtype=np.uint64)).shape == (0,)
