"""The pieces of the sparse transform: linear algebra over two elements, the decoder, hashes against sums by hand, noise quantiles, least squares."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy.stats import chi2

from dither.special import fwht
from dither.special.spright import bch, detect, viterbi
from dither.special.spright.gf2 import echelon, random_full_rank, random_masks, signs, span, transposed, units
from dither.special.spright.hashing import Group, matrices
from dither.special.spright.noise import chi_square, estimate, wide_margin
from dither.special.spright.peel import add_rows, energies, peel, summed
from dither.special.spright.query import Samples, to_bits
from dither.special.spright.refit import refit, subtract


def inner(a: int, b: int) -> int:
    return (a & b).bit_count() % 2


def times(columns: np.ndarray, index: int) -> int:
    total = 0
    for i, column in enumerate(columns.tolist()):
        total ^= column if index >> i & 1 else 0
    return total


# -- two elements --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "b"), [(1, 1), (7, 3), (12, 12), (40, 9), (63, 20)])
def test_full_rank_matrices(n: int, b: int) -> None:
    g = np.random.default_rng(n)
    columns = random_full_rank(n, b, g)
    found = echelon(columns)
    assert found.rank == b and len(np.unique(span(columns)[: 1 << min(b, 10)])) == 1 << min(b, 10)
    null = found.null_space(n)
    assert len(null) == n - b and echelon(null).rank == n - b
    assert not transposed(columns, null).any()
    j = g.integers(0, 1 << b, 50)
    assert np.array_equal(transposed(columns, detect.span_at(found.preimages(), j)), j)
    for d in random_masks(n, 20, g).tolist():
        rest, index = found.split(d)
        assert d == rest ^ times(columns, index)
        assert found.split(d ^ times(columns, 5 % (1 << b)))[0] == rest  # one representative a coset


def test_signs_and_spans_by_hand() -> None:
    a, b = random_masks(63, 20, np.random.default_rng(0)), random_masks(63, 30, np.random.default_rng(1))
    expected = [[(-1) ** inner(x, y) for y in b.tolist()] for x in a.tolist()]
    assert np.array_equal(signs(a, b), expected)
    columns = random_full_rank(20, 5, np.random.default_rng(2))
    assert span(columns).tolist() == [times(columns, i) for i in range(32)]
    assert [inner(int(c), int(a[0])) for c in columns] == [int(transposed(columns, a[:1])[0]) >> i & 1 for i in range(5)]
    assert echelon([3, 5, 6]).rank == 2  # 3 + 5 = 6


# -- the code ------------------------------------------------------------------------------------------------------------------


def encoded(bits: list[int]) -> list[int]:
    """By a shift register, bit by bit."""
    register, word = [0] * 7, []
    for bit in [*bits, *[0] * 6]:
        register = [bit, *register[:6]]
        for taps in ((1, 0, 1, 1, 0, 1, 1), (1, 1, 1, 1, 0, 0, 1)):  # 133, 171 octal
            word.append(sum(r * t for r, t in zip(register, taps, strict=True)) % 2)
    return word


@pytest.mark.parametrize("n", [1, 2, 7, 25, 63])
def test_offsets_are_the_encoder(n: int) -> None:
    columns = viterbi.columns(n)
    assert len(columns) == viterbi.length(n)
    for k in [0, *random_masks(n, 20, np.random.default_rng(n)).tolist()]:
        assert [inner(k, int(c)) for c in columns] == encoded([k >> i & 1 for i in range(n)])


@pytest.mark.parametrize("n", [1, 4, 9])
def test_the_decoder_is_maximum_likelihood(n: int) -> None:
    """Against all 2^n words, at every noise; more words than one chunk."""
    g = np.random.default_rng(n)
    words = signs(np.arange(1 << n, dtype=np.uint64), viterbi.columns(n))  # [2^n, P]
    sent = g.integers(0, 1 << n, 600)
    y = words[sent] + g.choice([0.3, 1.0, 3.0], (600, 1)) * g.standard_normal((600, words.shape[1]))
    correlation = y @ words.T
    k, metric = viterbi.decode(y, n)
    assert np.array_equal(k, correlation.argmax(axis=1))
    np.testing.assert_allclose(metric, correlation.max(axis=1), rtol=1e-12)
    assert viterbi.decode(y[:0], n)[0].shape == (0,)


def test_the_decoder_corrects_long_messages() -> None:
    k = random_masks(50, 200, np.random.default_rng(0))
    y = signs(k, viterbi.columns(50)) + 0.6 * np.random.default_rng(1).standard_normal((200, 112))
    assert (viterbi.decode(y, 50)[0] == k).mean() > 0.98
    assert ((y < 0) != (signs(k, viterbi.columns(50)) < 0)).mean() > 0.04  # there was something to correct


# -- hashes --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["random", "block", "overlap"])
def test_a_bin_is_the_sum_of_its_coefficients(kind: str) -> None:
    """U[j, p] by its definition over all k, for offsets that share cosets and others."""
    n, b, g = 9, 3, np.random.default_rng(0)
    x = g.standard_normal(1 << n)
    f = fwht(x)
    offsets = np.concatenate([[np.uint64(0)], units(n), random_masks(n, 3, g)])
    for columns in matrices(kind, n, b, 3, g):
        samples = Samples(f, n, False)
        group = Group.sampled(columns, offsets, samples)
        expected = np.zeros((1 << b, len(offsets)))
        for k in range(1 << n):
            j = sum(inner(int(c), k) << i for i, c in enumerate(columns))
            expected[j] += [x[k] * (-1) ** inner(int(d), k) for d in offsets]
        np.testing.assert_allclose(group.transform(), expected, atol=1e-12)
        assert samples.calls == len(np.unique(group.masks())) == len(group.first) << b  # nothing twice
        assert len(group.first) < len(offsets) or kind == "random"
        finer = group
        for column in random_full_rank(n, n, g).tolist():
            if echelon([*finer.columns.tolist(), column]).rank == len(finer.columns) + 1 and len(finer.columns) < 6:
                before = samples.calls
                finer = finer.finer(column, samples)
                anew = Group.sampled(finer.columns, offsets, Samples(f, n, False))
                assert np.array_equal(finer.samples, anew.samples)
                assert samples.calls - before <= anew.samples.size - len(group.first) * (len(finer.columns) == b + 1)


def test_one_group_of_all_bins_is_the_dense_transform() -> None:
    n, g = 8, np.random.default_rng(0)
    f = g.standard_normal(1 << n)
    group = Group.sampled(random_full_rank(n, n, g), np.zeros(1, dtype=np.uint64), Samples(f, n, False))
    k = np.arange(1 << n, dtype=np.uint64)
    np.testing.assert_allclose(group.transform()[group.hash(k), 0], fwht(f)[k] / (1 << n), atol=1e-15)


def test_blocks_alias_plainly() -> None:
    """Bits of a block of unit vectors at zero offset: X summed over all other bits."""
    n, b = 9, 3
    x = np.random.default_rng(0).standard_normal(1 << n)
    for c, columns in enumerate(matrices("block", n, b, 3, np.random.default_rng(0))):
        group = Group.sampled(columns, np.zeros(1, dtype=np.uint64), Samples(fwht(x), n, False))
        axes = tuple(axis for axis in range(3) if axis != 2 - c)
        np.testing.assert_allclose(group.transform()[:, 0], x.reshape(8, 8, 8).sum(axis=axes), atol=1e-12)
    with pytest.raises(ValueError, match=r"^hashing: 3 blocks of 4 bits"):
        matrices("block", 9, 4, 3, np.random.default_rng(0))
    assert [c.tolist() for c in matrices("overlap", 8, 4, 3, np.random.default_rng(0))] == [
        [1, 2, 4, 8], [4, 8, 16, 32], [32, 64, 128, 1]
    ]  # fmt: skip


# -- few bits --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 3, 6, 7, 8, 15, 16, 31, 40, 63])
@pytest.mark.parametrize("t", [1, 2, 3, 5])
def test_masks_of_few_bits_come_back_from_their_parities(n: int, t: int) -> None:
    g = np.random.default_rng(n)
    k = np.array([sum(1 << int(i) for i in g.choice(n, min(n, int(c)), replace=False)) for c in g.integers(0, t + 1, 400)], dtype=np.uint64)
    if n <= 8:
        k = np.array([m for m in range(1 << n) if m.bit_count() <= t], dtype=np.uint64)
    rows = bch.checks(n, t)
    assert len(rows) == t * bch.width(n) and (n == 1 or rows.max() < 1 << n)
    parities = np.bitwise_count(k[:, None] & rows[None, :]) & 1 == 1
    assert np.array_equal(bch.decode(parities, n, t), k)


def test_the_checks_are_those_of_galois_theory() -> None:
    """The (15, 7) and (15, 5) codes' words, multiples of the generators x^8 + x^7 + x^6 + x^4 + 1 and x^10 + x^8 + x^5 + x^4 + x^2 + x + 1, have
    no odd parity (Lin and Costello, table 6.1)."""
    for t, generator in ((2, 0b111010001), (3, 0b10100110111)):
        words = np.array([generator << i for i in range(15 - generator.bit_length() + 1)], dtype=np.uint64)
        assert not (np.bitwise_count(words[:, None] & bch.checks(15, t)[None, :]) & 1).any()


# -- detection -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", detect.MODES)
@pytest.mark.parametrize("factor", [1.0, -2.5, 3 * np.exp(2.2j)])
def test_every_mode_locates_a_lone_coefficient(mode: str, factor: complex) -> None:
    n, b, g = 12, 4, np.random.default_rng(0)
    found = detect.drawn(mode, n, None, 2, False, g)
    sizes = {"noiseless": n + 1, "ml": 3 * n, "nso": 10 * (n + 1), "so": 16 + 2 * (n + 6), "low_degree": 10 * (1 + 2 * 4)}
    assert len(found.offsets) == sizes[mode]
    group = Group.sampled(random_full_rank(n, b, g), found.offsets, Samples(np.zeros(1 << n), n, False))
    k = random_masks(n, 100, g)
    if mode == "low_degree":
        k = k[np.bitwise_count(k) <= 2]
    value = factor if isinstance(factor, complex) else float(factor)
    u = value * signs(k, found.offsets)
    noise = 0.0 if mode == "noiseless" else 0.2 * abs(factor)
    u = u + noise * g.standard_normal(u.shape)
    assert np.array_equal(found.locate(u, group.hash(k), group), k)


def test_likely_is_the_best_of_all() -> None:
    n, g = 8, np.random.default_rng(0)
    found = detect.drawn("ml", n, 12, None, False, g)
    group = Group.sampled(random_full_rank(n, 3, g), found.offsets, Samples(np.zeros(1 << n), n, False))
    u, bins = g.standard_normal((40, 12)), g.integers(0, 8, 40)
    every = np.arange(1 << n, dtype=np.uint64)
    correlation = np.abs(u @ signs(found.offsets, every))
    correlation[group.hash(every)[None, :] != bins[:, None]] = -1
    assert np.array_equal(found.locate(u, bins, group), correlation.argmax(axis=1))


def test_offsets_differ() -> None:
    assert len(np.unique(detect.distinct(4, 16, np.random.default_rng(0)))) == 16
    with pytest.raises(ValueError, match=r"^p1: 17 offsets of 4 bits"):
        detect.distinct(4, 17, np.random.default_rng(0))
    with pytest.raises(ValueError, match=r"^mode: 'ml'"):
        detect.drawn("ml", 21, None, None, False, np.random.default_rng(0))


# -- noise, peeling, fitting -----------------------------------------------------------------------------------------------------


def test_noise_quantiles() -> None:
    for freedom, q in itertools.product((13, 60, 400), (0.05, 0.125, 0.5, 0.99)):
        assert chi_square(q, freedom) == pytest.approx(chi2.ppf(q, freedom) / freedom, rel=0.01)
    assert chi_square(1e-9, 2) == 0
    assert wide_margin(60, 300) == pytest.approx(chi2.ppf(1 - 0.01 / 300, 60) / 60 - 1, rel=0.02)
    g = np.random.default_rng(0)
    energy = 4.0 * (g.standard_normal((2000, 60)) ** 2).mean(axis=1)
    energy[1000:] += g.random(1000) * 100
    assert estimate(energy, 60, 0.5) == pytest.approx(4, rel=0.03)


def made(n: int, support: np.ndarray, values: np.ndarray, groups: int, b: int, mode: str = "noiseless") -> tuple[list[Group], detect.Mode]:
    g = np.random.default_rng(5)
    found = detect.drawn(mode, n, None, None, False, g)
    f = Samples(lambda m: signs(m, support) @ values, n, False)
    return [Group.sampled(random_full_rank(n, b, g), found.offsets, f) for _ in range(groups)], found


def test_peeling_takes_each_coefficient_once() -> None:
    support = np.arange(40, dtype=np.uint64) * np.uint64(99991) % np.uint64(1 << 20)
    values = np.linspace(-3, 3, 40)
    groups, mode = made(20, support, values, 3, 6)
    u = [group.transform() for group in groups]
    found = peel(u, groups, mode, 1e-20, 30)
    order = np.argsort(support)
    assert np.array_equal(found.support, support[order])
    np.testing.assert_allclose(found.values, values[order], atol=1e-12)
    assert max(energies(bins).max() for bins in u) < 1e-24 and found.rounds >= 2
    assert peel([group.transform() for group in groups], groups, mode, 1e-20, 1).rounds == 1


def test_refit_is_least_squares() -> None:
    """Against a solver on the design matrix of all samples; with a coefficient that is missing, its bins are left out."""
    g = np.random.default_rng(0)
    support, values = random_masks(14, 20, g), g.standard_normal(20)
    groups, _ = made(14, support, values, 3, 5, "so")
    for group in groups:
        group.samples += 0.1 * g.standard_normal(group.samples.shape)
    u = [group.transform() for group in groups]
    masks = np.concatenate([group.masks() for group in groups])
    samples = np.concatenate([group.samples.reshape(-1) for group in groups])
    expected = np.linalg.lstsq(signs(masks, support), samples, rcond=None)[0]
    np.testing.assert_allclose(refit(u, groups, support, values, np.inf), expected, atol=1e-10)
    part = refit(u, groups, support[1:], values[1:], 3 * 0.01 / 32)
    assert np.abs(part - values[1:]).max() < 0.02 and abs(values[0]) > 0.05
    rest = subtract(u, groups, support, expected)
    assert np.mean([energies(bins).mean() for bins in rest]) == pytest.approx(0.01 / 32, rel=0.1)


def test_rows_add_up_where_places_repeat() -> None:
    to, places = np.zeros((4, 2)), np.array([3, 1, 3, 3])
    add_rows(to, places, np.array([[1.0, 2], [3, 4], [5, 6], [7, 8]]))
    assert to.tolist() == [[0, 0], [3, 4], [0, 0], [13, 16]]
    add_rows(to, places[:0], np.zeros((0, 2)))
    support, values = summed(np.array([5, 2, 5], dtype=np.uint64), np.array([1.0, 2, 4]))
    assert support.tolist() == [2, 5] and values.tolist() == [2, 5]


def test_queries_come_in_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dither.special.spright.query.BATCH", 8)
    sizes: list[int] = []

    def f(rows: np.ndarray) -> list[float]:
        sizes.append(len(rows))
        return [float(row @ [1, 2, 4, 8, 16]) for row in rows]

    samples = Samples(f, 5, True)
    assert samples(np.arange(20, dtype=np.uint64)).tolist() == list(range(20))
    assert sizes == [8, 8, 4] and samples.calls == 20
    assert to_bits(np.array([6], dtype=np.uint64), 4).tolist() == [[0, 1, 1, 0]]
