"""The Bessel kernels on every path: against arb in every region, at the borders, at the limits; no dependence on neighbours and threads."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dither.claims.bessel_oracle import exact, mixed_error, relative_error
from dither.kernels.bessel import REGIONS, BesselTables, log_bessel
from dither.kernels.bessel_reference import classify
from dither.special.bessel_tables import bessel_tables

T: BesselTables = bessel_tables()
# two pairs in every region, and what is hard: the curve where log I is 0, tiny and huge arguments, orders near 0 and near integers and halves
PAIRS = [
    (1.0, 2e3), (700.0, 1e9), (3.0, 31.0), (20.0, 250.0), (1e6, 663_000.0), (165.0, 1.0), (60.0, 1e-3), (100.0, 200.0), (31.0, 15.0), (0.61, 36.0),
    (12.71, 8.4), (0.71, 19.7), (13.0, 25.0), (0.0, 0.5), (7.3, 1.0), (0.5, 1e-3), (12.7, 2.9), (0.0, 1.01), (4.0, 8.0), (9.99, 3.1), (0.7, 30.0),
    (12.6, 8.1), (9.2, 6.1), (1e4, 6_627.0), (0.0, 1e-300), (1e-8, 1e-8), (1e-3, 1.1), (3.0, 1e-200), (0.9999999, 0.3), (1.0000001, 0.3), (2.5, 0.9),
    (0.4999, 1e-5), (1.0, 1e8), (1e6, 1e8), (5.0, 5e-324), (11.5, 0.999), (50.0, 1e-300), (1e6, 1.0),
]  # fmt: skip
# forced expressions that must agree across a border: (v, x), one region, the other
BORDERS = [
    ((2.0, 1400.0), "mu_20", "mu_3"), ((50.0, 1.25e6), "mu_20", "mu_3"), ((0.65, 30.0), "small_30", "mu_20"), ((0.7, 20.0), "small_30", "U_20"),
    ((7.0, 30.0), "U_20", "mu_20"), ((20.0, 200.0), "U_9", "mu_20"), ((12.7, 0.8), "small_1", "U_20"), ((12.7, 2.0), "small_3", "U_20"),
    ((12.7, 7.0), "small_8", "U_20"), ((12.7, 15.0), "small_30", "U_20"), ((30.0, 3.0), "U_20", "U_13"), ((57.0, 10.0), "U_13", "U_9"),
    ((164.0, 10.0), "U_9", "U_7"), ((10.0, 35.9074), "U_20", "U_13"), ((5.0, 84.4153), "U_13", "U_9"), ((0.31, 274.2377), "U_9", "U_7"),
    ((5.0, 1.0), "small_1", "small_3"), ((0.2, 1.0), "small_1", "small_3"), ((5.0, 3.0), "small_3", "small_8"), ((5.0, 8.0), "small_8", "small_30"),
]  # fmt: skip


def columns(pairs: list[tuple[float, float]]) -> tuple[Tensor, Tensor]:
    v, x = torch.tensor(pairs, dtype=torch.float64).T.contiguous()
    return v, x


def draws(n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Pairs over all regions, limits and NaN included."""
    generator = torch.Generator().manual_seed(seed)
    v, x = torch.randn(2, n, generator=generator, dtype=torch.float64).mul(3).add(torch.tensor([[2.0], [2.0]])).exp()
    v[::7] = torch.randint(0, 20, v[::7].shape, generator=generator).double()
    v[5::50], x[9::50], x[13::50], v[17::90] = 0, 0, math.inf, math.nan
    return v, x


def test_pairs_reach_every_region() -> None:
    v, x = columns(PAIRS)
    reached = {REGIONS[code] for code in classify(v, x).tolist()}
    assert reached == set(REGIONS) - {"U_4", "U_6", "limit"}  # those two are the paper's


@pytest.mark.parametrize("kind", ["I", "K"])
def test_against_arb(path: str, kind: str) -> None:
    v, x = columns(PAIRS)
    found = log_bessel(kind, v, x, T, ratio=True)
    assert found.ratio is not None
    for pair, value, ratio in zip(PAIRS, found.value.tolist(), found.ratio.tolist(), strict=True):
        log, quotient = exact(kind, *pair)
        assert mixed_error(value, log) < 4e-15, (kind, pair, value)
        if pair[1] > 1e-100:  # below, the rounding of v log x is all that counts
            assert relative_error(ratio, quotient) < 1e-14, (kind, pair, ratio)


@pytest.mark.parametrize("kind", ["I", "K"])
@pytest.mark.parametrize(("pair", "one", "other"), BORDERS, ids=lambda value: str(value))
def test_expressions_agree_at_borders(path: str, kind: str, pair: tuple[float, float], one: str, other: str) -> None:
    v, x = columns([pair])
    a, b = (log_bessel(kind, v, x, T, regions=torch.tensor([REGIONS.index(name)], dtype=torch.uint8), ratio=True) for name in (one, other))
    assert a.ratio is not None and b.ratio is not None
    assert abs(float(a.value - b.value)) <= 1e-14 * max(1.0, abs(float(a.value)))
    assert math.isclose(float(a.ratio), float(b.ratio), rel_tol=2e-14)


@pytest.mark.parametrize("kind", ["I", "K"])
def test_limits(path: str, kind: str) -> None:
    inf, nan = math.inf, math.nan
    cases = {  # (v, x): log I, ratio of I, log K, ratio of K
        (0.0, 0.0): (0.0, 0.0, inf, inf), (0.3, 0.0): (-inf, 0.0, inf, inf), (0.5, 0.0): (-inf, 0.0, inf, 1.0), (2.0, 0.0): (-inf, 0.0, inf, 0.0),
        (0.0, inf): (inf, 1.0, -inf, 1.0), (2.0, inf): (inf, 1.0, -inf, 1.0), (inf, 3.0): (-inf, 0.0, inf, 0.0), (inf, 0.0): (-inf, 0.0, inf, 0.0),
        (inf, inf): (nan, nan, nan, nan), (nan, 1.0): (nan, nan, nan, nan), (1.0, nan): (nan, nan, nan, nan), (-1.0, 1.0): (nan, nan, nan, nan),
        (1.0, -1.0): (nan, nan, nan, nan), (-1.0, 0.0): (nan, nan, nan, nan),
    }  # fmt: skip
    v, x = columns(list(cases))
    found = log_bessel(kind, v, x, T, ratio=True)
    assert found.ratio is not None
    both = torch.tensor(list(cases.values()), dtype=torch.float64)
    expected = both[:, :2] if kind == "I" else both[:, 2:]
    torch.testing.assert_close(torch.stack([found.value, found.ratio], 1), expected, rtol=0, atol=0, equal_nan=True)


def test_huge_orders_and_arguments_stay_finite(path: str) -> None:
    v, x = columns([(1e150, 1e151), (1e150, 1e-150), (1e100, 1e100), (2.0, 1e300), (0.0, 1.7e308), (1e150, 1.5e150)])
    for kind in ("I", "K"):
        assert bool(log_bessel(kind, v, x, T).value.isfinite().all())
    assert math.isclose(float(log_bessel("I", v[:1], x[:1], T).value), (1.01**0.5 * 10 - math.asinh(0.1)) * 1e150, rel_tol=1e-15)


@pytest.mark.parametrize("kind", ["I", "K"])
def test_instruction_sets_agree(on: Callable[[str], None], kind: str) -> None:
    """AVX2 and AVX-512 bit for bit; without fused multiply-adds to rounding."""
    v, x = draws(20_000)
    on("avx2")
    value, ratio = log_bessel(kind, v, x, T, ratio=True)
    on("avx512")
    again, ratio_again = log_bessel(kind, v, x, T, ratio=True)
    assert torch.equal(value.nan_to_num(7), again.nan_to_num(7)) and ratio is not None and ratio_again is not None
    assert torch.equal(ratio.nan_to_num(7), ratio_again.nan_to_num(7))
    on("scalar")
    plain, _ = log_bessel(kind, v, x, T)
    torch.testing.assert_close(plain, value, rtol=1e-14, atol=1e-14, equal_nan=True)


@pytest.mark.parametrize("kind", ["I", "K"])
def test_the_reference_agrees(on: Callable[[str], None], kind: str) -> None:
    """Its regions and values, sorted or not."""
    v, x = draws(5_000)
    on("reference")
    value, ratio = log_bessel(kind, v, x, T, ratio=True)
    plain, ratio_plain = log_bessel(kind, v, x, T, ratio=True, sort=False)
    assert torch.equal(plain.nan_to_num(7), value.nan_to_num(7)) and ratio is not None and ratio_plain is not None
    assert torch.equal(ratio_plain.nan_to_num(7), ratio.nan_to_num(7))
    on("avx2")
    native = log_bessel(kind, v, x, T)
    torch.testing.assert_close(native.value, value, rtol=1e-14, atol=1e-14, equal_nan=True)
    given = log_bessel(kind, v, x, T, regions=classify(v, x))
    assert torch.equal(given.value.nan_to_num(7), native.value.nan_to_num(7))


def test_neither_neighbours_nor_threads_matter(path: str) -> None:
    """Every length around a vector and a chunk; a permutation; one region alone; three threads."""
    v, x = draws(10_000)
    for kind in ("I", "K"):
        whole, ratio = log_bessel(kind, v, x, T, ratio=True)
        assert ratio is not None
        whole, ratio = whole.nan_to_num(7), ratio.nan_to_num(7)
        for n in (0, 1, 2, 7, 8, 9, 31, 4095, 4096, 4097):
            part = log_bessel(kind, v[:n].clone(), x[:n].clone(), T, ratio=True)
            assert torch.equal(part.value.nan_to_num(7), whole[:n]) and part.ratio is not None
            assert torch.equal(part.ratio.nan_to_num(7), ratio[:n])
        order = torch.randperm(len(v), generator=torch.Generator().manual_seed(1))
        assert torch.equal(log_bessel(kind, v[order], x[order], T).value.nan_to_num(7), whole[order])
        alone = (classify(v, x) == REGIONS.index("U_7")).nonzero().squeeze(1)
        alone = alone[: len(alone) // 8 * 8]
        assert len(alone) > 100 and torch.equal(log_bessel(kind, v[alone], x[alone], T).value, whole[alone])
        torch.set_num_threads(3)
        assert torch.equal(log_bessel(kind, v, x, T).value.nan_to_num(7), whole)
        torch.set_num_threads(1)


def test_wrong_arguments() -> None:
    v = x = torch.ones(4, dtype=torch.float64)
    regions = torch.zeros(4, dtype=torch.uint8)
    for name, call in [
        ("kind", lambda: log_bessel("J", v, x, T)),
        ("v", lambda: log_bessel("I", v.float(), x, T)),
        ("v", lambda: log_bessel("I", v[None], x, T)),
        ("x", lambda: log_bessel("I", v, x[:3].clone(), T)),
        ("x", lambda: log_bessel("I", v[:2].clone(), x[::2], T)),
        ("regions", lambda: log_bessel("I", v, x, T, regions=regions.int())),
        ("regions", lambda: log_bessel("I", v, x, T, regions=regions[:2].clone())),
        ("regions", lambda: log_bessel("I", v, x, T, regions=regions + len(REGIONS))),
        ("tables.logs", lambda: log_bessel("I", v, x, T._replace(logs=T.logs[:2].clone()))),
        ("tables.nodes", lambda: log_bessel("I", v, x, T._replace(nodes=T.nodes.float()))),
    ]:
        with pytest.raises(ValueError, match=f"^{name}: "):
            call()
