"""SPRIGHT: the Walsh-Hadamard transform of a function of n bits with few non-zero coefficients, from few of its 2^n values.

    f(m) = sum_k X_k (-1)^<m, k> + w(m),     X_k = 2^-n sum_m f(m) (-1)^<m, k>,     m, k in F_2^n,     w independent, of variance sigma^2

so with y = `fwht` (f), X = y / 2^n, and SNR = sum X^2 / sigma^2. Masks are unsigned integers, bit i the coordinate i. C hashes into B = 2^b bins,
P offsets each (`hashing`, `detect`), then peeling (`peel`), then least squares on what was found (`refit`), again for what is left, at most `SWEEPS`
times.

Cost for K coefficients: C P B samples, C P B (b + 1) + K C P operations and the detections; B about K, P = n + 1 without noise, O(n) for ``so``, O(n)
P1 for ``nso``: K log N samples where noise allows, K log^2 N in ``nso``; O(log n) where degrees are low. Recovery is likely, not sure:
`SparseWHT.complete` says whether all bins were explained.

Source: Li, Bradley, Pawar, Ramchandran, SPRIGHT, 2015 (1508.06336). Ours are the random hashes' rank check, the code of ``so``, thresholds for
small P, and the refit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from dither.special.spright.bch import width
from dither.special.spright.detect import MODES, Mode, drawn
from dither.special.spright.gf2 import Masks, Values, signs, units
from dither.special.spright.hashing import HASHES, Group, matrices
from dither.special.spright.noise import TINY, estimate, margin, wide_margin
from dither.special.spright.peel import energies, peel, summed
from dither.special.spright.query import Function, Samples, to_bits
from dither.special.spright.refit import refit, subtract

SWEEPS = 5
FIRST_BITS = 6  # bins to start with where K is unknown: 64
STUCK = 0.6  # share of bins that peeling leaves, from which on more bins are needed
LEAST = 5.0  # standard deviations that a coefficient must stand above its own noise: among thousands of candidates some reach 4
DROP = 0.5  # of a bin's energy, where noise is estimated
LARGEST_DENSE = 26  # bits
CHUNK = 1 << 22  # signs at once


@dataclass(frozen=True)
class SparseWHT:
    """What was found. Calling it with masks gives sum_k X_k (-1)^<m, k>; so does a matrix of bits ``[Q, n]``."""

    n: int
    support: Masks  # [K], the k, by falling |X_k|
    values: Values  # [K], X_k; float64, complex128 where f is complex
    complete: bool  # every bin was explained up to noise
    unresolved: int  # bins that were not
    bins: int  # C B of them in all
    residual: float  # root mean square of what samples leave unexplained
    sigma: float  # the noise that was given or estimated
    rounds: int  # of peeling
    mode: str
    n_calls: int  # masks that f was asked for
    groups: tuple[Group, ...] = field(repr=False, compare=False)

    @cached_property
    def n_queries(self) -> int:
        """Distinct masks among those; groups share some."""
        masks = [group.masks() for group in self.groups]
        if self.n <= LARGEST_DENSE:
            seen = np.zeros(1 << self.n, dtype=bool)
            for some in masks:
                seen[some] = True
            return int(seen.sum())
        return len(np.unique(np.concatenate(masks)))

    def __call__(self, masks: np.ndarray) -> Values:
        """The found function ``[Q]`` at masks ``[Q]``, integers, or at bits ``[Q, n]``. Raises ValueError for other shapes and types."""
        masks = np.asarray(masks)
        if masks.ndim == 2 and masks.shape[1] == self.n:
            masks = ((masks != 0) * units(self.n)).sum(axis=1, dtype=np.uint64)
        if masks.ndim != 1 or masks.dtype.kind not in "ui":
            raise ValueError(f"masks: shape {list(masks.shape)} and dtype {masks.dtype}, must be integers [Q] or bits [Q, {self.n}]")
        masks = masks.astype(np.uint64)
        step = max(1, CHUNK // max(1, len(self.support)))
        parts = [signs(masks[i : i + step], self.support) @ self.values for i in range(0, len(masks), step)]
        return np.concatenate(parts) if parts else np.zeros(0, dtype=self.values.dtype)

    def to_dense(self) -> Values:
        """X as an array ``[2^n]``; `fwht` of it is the found f. Raises ValueError for n above 26."""
        if self.n > LARGEST_DENSE:
            raise ValueError(f"n: {self.n} bits are too many for a dense array; at most {LARGEST_DENSE}")
        dense = np.zeros(1 << self.n, dtype=self.values.dtype)
        dense[self.support] = self.values
        return dense

    def bits(self) -> np.ndarray:
        """The support as ``[K, n]`` uint8: which coordinates each interaction joins."""
        return to_bits(self.support, self.n)


def sparse_wht(
    f: Function | np.ndarray,
    n: int | None = None,
    k: int | None = None,
    sigma: float | None = 0.0,
    mode: str | None = None,
    seed: int = 0,
    *,
    groups: int = 3,
    eta: float = 1.0,
    hashing: str = "random",
    p1: int | None = None,
    degree: int | None = None,
    gamma: float | None = None,
    drop: float | None = None,
    rounds: int = 30,
    bits: bool = False,
    max_queries: int = 1 << 24,
) -> SparseWHT:
    """The large Walsh-Hadamard coefficients of ``f``, a function of n <= 63 bits that is sampled where the method needs it.

    ``f``: takes masks ``[Q]`` uint64, or with ``bits`` rows ``[Q, n]`` uint8, at most 2^20 at once, and returns ``[Q]`` real or complex numbers;
    or is an array of all 2^n values. It must give the same value for the same mask. ``k``: about how many coefficients there are; B is the least
    power of two from ``eta`` k on. None: B starts at 64 and doubles, samples kept, while more than 60 % of the bins stay unexplained and
    ``max_queries`` allows it. ``sigma``: the standard deviation of noise in f, and of all that is not sparse; 0 trusts every digit (of float64;
    give 1e-6 of the scale for a float32 f); None estimates it.

    ``mode``: 'noiseless' (the default for sigma 0), 'nso' (the default else), 'so' (fewest samples under noise), 'ml' (the slow reference, n <= 20),
    'low_degree' (the default where ``degree`` is given). ``degree``: no coefficient joins more than so many bits, as in a tree of that depth; then
    degree log2(n) parities do in place of n. ``p1``: random offsets (10 in nso and low_degree, 16 in so, 3 n in ml). ``groups``: C. ``hashing``:
    'random', 'block' or 'overlap'. ``gamma``: a bin is noise up to (1 + gamma) times its noise power; by default what P allows. ``drop``: a bin holds
    one coefficient also where taking it out leaves less than this share of its energy, for an f that is sparse only roughly; by default a half where
    sigma is estimated, else 0. ``rounds``: of peeling, each sweep. ``seed``: of hashes and offsets.

    Raises ValueError, naming the argument, for values outside of these, n outside of 1 .. 63, an array whose length is not 2^n, k above 2^n / 4,
    blocks that do not fit, p1 < 1 or more offsets than masks, and an f that returns another shape, no numbers, NaN or inf. Recovery that fails is
    no error: `SparseWHT.complete`.
    """
    n = _check(f, n, k, sigma, mode, groups, eta, hashing, p1, degree, gamma, drop, rounds, max_queries)
    chosen = mode or ("low_degree" if degree is not None else "noiseless" if sigma == 0 else "nso")
    generator = np.random.default_rng(seed)
    detector = drawn(chosen, n, p1, degree, sigma == 0, generator)
    samples = Samples(f, n, bits)
    b = min(n, FIRST_BITS if k is None else max(1, math.ceil(math.log2(eta * k))))
    most = b if k is not None else _most_bits(n, groups, len(detector.offsets), hashing, max_queries, b)
    columns = matrices(hashing, n, most, groups, generator)
    made = [Group.sampled(c[:b], detector.offsets, samples) for c in columns]
    while True:
        solved = _solve(made, detector, sigma, k, gamma, rounds, DROP if drop is None and sigma is None else drop or 0.0)
        if b >= most or not solved.stuck(sigma is None):
            break
        made = [group.finer(int(c[b]), samples) for group, c in zip(made, columns, strict=True)]
        b += 1
    order = np.lexsort((solved.support, -np.abs(solved.values)))
    return SparseWHT(
        n=n,
        support=solved.support[order],
        values=solved.values[order],
        complete=solved.unresolved == 0,
        unresolved=solved.unresolved,
        bins=groups << b,
        residual=solved.residual,
        sigma=math.sqrt(solved.noise * (1 << b)) if sigma is None else float(sigma),
        rounds=solved.rounds,
        mode=chosen,
        n_calls=samples.calls,
        groups=tuple(made),
    )


@dataclass(frozen=True)
class _Solved:
    """One size of bins, solved as far as it goes. ``noise``: nu2, of a bin's value; ``explained``: the share of the samples' power."""

    support: Masks
    values: Values
    unresolved: int
    bins: int
    residual: float
    noise: float
    explained: float
    rounds: int

    def stuck(self, estimated: bool) -> bool:
        """Whether more bins are needed. Where noise was estimated, bins that hold many coefficients each pass for noise: their power tells."""
        return self.unresolved > STUCK * self.bins or (estimated and self.explained < 0.5)


def _solve(groups: Sequence[Group], mode: Mode, sigma: float | None, k: int | None, gamma: float | None, rounds: int, drop: float) -> _Solved:
    bins = [group.transform() for group in groups]  # [B, P] each
    size = groups[0].bins
    total = size * len(groups)
    freedom = min(len(group.first) for group in groups) * (2 if np.iscomplexobj(bins[0]) else 1)
    floor = TINY * max(float((np.abs(u) ** 2).max()) for u in bins)
    seen = sum(len(group.first) for group in groups)  # values that each coefficient is fitted to
    wide = wide_margin(freedom, total)
    empty = 0.5 if k is None else math.exp(-k / size)

    support, values = np.zeros(0, dtype=np.uint64), np.zeros(0, dtype=bins[0].dtype)
    done = 0
    for sweep in range(SWEEPS):
        rest = subtract(bins, groups, support, values)
        found_in = np.concatenate([energies(u) for u in rest])
        noise = max(estimate(found_in, freedom, empty) if sigma is None else sigma**2 / size, floor)
        # first a tight bound, so that few pass by chance; then one that leaves no true one out
        over = wide if sweep else margin(freedom) if gamma is None else gamma
        found = peel(rest, groups, mode, (1 + over) * noise, rounds, drop)
        done += found.rounds
        if not len(found.support) and sweep:
            break
        support, values = summed(np.concatenate([support, found.support]), np.concatenate([values, found.values]))
        support, values = _fitted(bins, groups, support, values, (1 + wide) * noise, max(LEAST**2 * noise / seen, floor))
        empty = min(1.0, max(0.25, float(np.mean(np.concatenate([energies(u) for u in rest]) <= (1 + wide) * noise))))
    rest = subtract(bins, groups, support, values)
    left = np.concatenate([energies(u) for u in rest])
    unexplained = float(np.mean([energies(u[:, g.first]).mean() for u, g in zip(rest, groups, strict=True)]))
    power = float(np.mean([energies(u[:, g.first]).mean() for u, g in zip(bins, groups, strict=True)]))
    return _Solved(
        support=support,
        values=values,
        unresolved=int((left > (1 + wide) * noise).sum()),
        bins=total,
        residual=math.sqrt(unexplained * size),
        noise=noise,
        explained=1 - unexplained / power if power > 0 else 1.0,
        rounds=done,
    )


def _fitted(
    bins: Sequence[Values], groups: Sequence[Group], support: Masks, values: Values, noise: float, least: float
) -> tuple[Masks, Values]:
    """The support refitted, without what is then below sqrt(least); what goes changes what its bins say of others, so again until all stay."""
    while True:
        values = refit(bins, groups, support, values, noise)
        large = np.abs(values) ** 2 >= least
        if large.all():
            return support, values
        support, values = support[large], values[large]


def _most_bits(n: int, groups: int, offsets: int, hashing: str, max_queries: int, b: int) -> int:
    """How far the number of bins may grow."""
    room = n // groups if hashing == "block" else n
    return max(b, min(room, int(math.log2(max(1, max_queries / (groups * offsets))))))


def _check(
    f: Any, n: int | None, k: int | None, sigma: float | None, mode: str | None, groups: int, eta: float, hashing: str,
    p1: int | None, degree: int | None, gamma: float | None, drop: float | None, rounds: int, max_queries: int,
) -> int:  # fmt: skip
    """n. Raises ValueError or TypeError for wrong arguments."""
    if isinstance(f, np.ndarray):
        length = f.shape[0] if f.ndim == 1 else 0
        if length < 2 or length & (length - 1):
            raise ValueError(f"f: shape {list(f.shape)}, must be [2^n], n at least 1")
        if n is not None and length != 1 << n:
            raise ValueError(f"n: {n} bits need 2^{n} values, f has {length}")
        n = length.bit_length() - 1
    elif not callable(f):
        raise TypeError(f"f: must be a function or an array, not {type(f).__name__}")
    if n is None:
        raise ValueError("n: must be given where f is a function")
    if not 1 <= n <= 63:
        raise ValueError(f"n: must be 1 .. 63, not {n}")
    if k is not None and k < 1:
        raise ValueError(f"k: must be at least 1, not {k}")
    if k is not None and 4 * k > 1 << n:
        raise ValueError(f"k: {k} of 2^{n} coefficients are not sparse, at most a quarter is; use fwht on all values")
    if sigma is not None and not 0 <= sigma < math.inf:
        raise ValueError(f"sigma: must be at least 0, or None to estimate it, not {sigma}")
    if mode is not None and mode not in MODES:
        raise ValueError(f"mode: {mode!r}, must be one of {', '.join(MODES)}")
    if degree is None and mode == "low_degree":
        raise ValueError("degree: 'low_degree' must know how many bits a coefficient joins at most")
    if degree is not None and mode not in (None, "low_degree"):
        raise ValueError(f"degree: belongs to the mode 'low_degree', not to {mode!r}")
    if degree is not None and not 1 <= degree * width(n) < n:
        raise ValueError(f"degree: {degree} asks for {degree * width(n)} parities, must be 1 .. {n - 1} of them; without it {n} do for any degree")
    if hashing not in HASHES:
        raise ValueError(f"hashing: {hashing!r}, must be one of {', '.join(HASHES)}")
    if groups < 1:
        raise ValueError(f"groups: must be at least 1, not {groups}")
    if not 0 < eta < math.inf:
        raise ValueError(f"eta: must be positive, not {eta}")
    if p1 is not None and p1 < 1:
        raise ValueError(f"p1: must be at least 1, not {p1}")
    if gamma is not None and not 0 < gamma < math.inf:
        raise ValueError(f"gamma: must be positive, not {gamma}")
    if drop is not None and not 0 <= drop < 1:
        raise ValueError(f"drop: must be at least 0 and less than 1, not {drop}")
    if rounds < 1:
        raise ValueError(f"rounds: must be at least 1, not {rounds}")
    if max_queries < 1:
        raise ValueError(f"max_queries: must be at least 1, not {max_queries}")
    return n
