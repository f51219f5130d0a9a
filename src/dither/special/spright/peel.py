"""Peeling: find bins with one coefficient, take it out of the bins of every group, and look again at those.

In one group different bins hold different k, so all its bins are looked at together and what is found is peeled at once: this is the sequential
algorithm in another order. Two groups never look at the same time, so none peels what another just did.

    singleton (k, rho):   M^T k = j,   |U - rho s_k|^2 / P <= (1 + gamma) nu2,   rho = <s_k, U> / P,   s_k[p] = (-1)^<d_p, k>

A bin that a large coefficient dominates may pass with a wrong value; what is left of it shows up again elsewhere, and values add up. Where f is
sparse only roughly, no bin is ever down to noise: there one passes as well whose energy falls by enough, |U - rho s_k|^2 < drop |U|^2.

Source: 1508.06336, algorithm 1; the drop of energy, q-SFT (2301.06200). Cost: a detection for each bin that changed, P for each coefficient and
group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dither.special.spright.detect import Mode
from dither.special.spright.gf2 import Masks, Reals, Values, signs
from dither.special.spright.hashing import Group

ROWS = 2048  # bins that are looked at together


@dataclass
class Found:
    """What a run of peeling took out: ``values`` add up where a k stands twice."""

    support: Masks
    values: Values
    rounds: int


def energies(u: Values) -> Reals:
    """The mean square ``[A]`` of rows ``[A, P]``."""
    mean: Reals = (u.real**2 + u.imag**2).mean(axis=1) if np.iscomplexobj(u) else np.einsum("ap,ap->a", u, u) / u.shape[1]
    return mean


def peel(u: Sequence[Values], groups: Sequence[Group], mode: Mode, noise: float, rounds: int, drop: float = 0.0) -> Found:
    """Peel the bins ``u`` (a ``[B, P]`` for each group, overwritten) down to ``noise`` = (1 + gamma) nu2, in up to so many rounds."""
    active = [np.ones(len(bins), dtype=bool) for bins in u]
    most = 4 * sum(len(bins) for bins in u)  # a sparse signal never has so many: what was found is wrong
    ks: list[Masks] = []
    rhos: list[Values] = []
    count = done = 0
    while done < rounds and count <= most:
        before = count
        done += 1
        for c, group in enumerate(groups):
            bins = np.flatnonzero(active[c])
            active[c][:] = False
            for i in range(0, len(bins), ROWS):
                k, rho, s = _singletons(u[c], bins[i : i + ROWS], group, mode, noise, drop)
                if not len(k):
                    continue
                for other, values, changed in zip(groups, u, active, strict=True):
                    places = other.hash(k)
                    add_rows(values, places, -rho[:, None] * s)
                    changed[places] = True
                ks.append(k)
                rhos.append(rho)
                count += len(k)
        if count == before:
            break
    if not ks:
        return Found(np.zeros(0, dtype=np.uint64), np.zeros(0), done)
    return Found(*summed(np.concatenate(ks), np.concatenate(rhos)), done)


def _singletons(u: Values, bins: np.ndarray, group: Group, mode: Mode, noise: float, drop: float) -> tuple[Masks, Values, Reals]:
    """``k [A']``, ``rho [A']`` and signs ``[A', P]`` of those bins that hold one coefficient."""
    bins = bins[energies(u[bins]) > noise]
    values = u[bins]
    k = mode.locate(values, bins, group)
    right = group.hash(k) == bins
    k, values = k[right], values[right]
    s = signs(k, mode.offsets)
    rho: Values = (s * values).mean(axis=1)
    rest = energies(values - rho[:, None] * s)
    alone = (rest <= noise) | (rest < drop * energies(values))
    return k[alone], rho[alone], s[alone]


def add_rows(to: Values, places: np.ndarray, rows: Values) -> None:
    """``to[places] += rows``, where places may repeat."""
    order = np.argsort(places, kind="stable")
    ordered = places[order]
    starts = np.flatnonzero(np.append(True, ordered[1:] != ordered[:-1])) if len(ordered) else np.zeros(0, dtype=np.int64)
    if len(starts):
        to[ordered[starts]] += np.add.reduceat(rows[order], starts, axis=0)


def summed(support: Masks, values: Values) -> tuple[Masks, Values]:
    """Each k once, with the sum of its values."""
    unique, place = np.unique(support, return_inverse=True)
    total = np.zeros(len(unique), dtype=values.dtype)
    np.add.at(total, place, values)
    return unique, total
