"""The least squares of all samples on a found support.

The transform of a group is orthogonal up to its scale, so this is least squares of the bins: minimise sum over groups, bins and cosets of |U -
model|^2, where the model puts X_k s_k[p] into bin M^T k. Its normal equations are nearly a multiple of the identity, so conjugate gradients take a
handful of steps of cost C P |X|.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dither.special.spright.gf2 import Masks, Values, signs
from dither.special.spright.hashing import Group
from dither.special.spright.peel import add_rows, energies

STEPS = 50
ENOUGH = 1e-13  # of the values' norm


def subtract(u: Sequence[Values], groups: Sequence[Group], support: Masks, values: Values) -> list[Values]:
    """Bins ``[B, P]`` of each group without the model's."""
    left = []
    for bins, group in zip(u, groups, strict=True):
        rest = bins.astype(np.result_type(bins, values))
        add_rows(rest, group.hash(support), -values[:, None] * signs(support, group.offsets))
        left.append(rest)
    return left


def refit(u: Sequence[Values], groups: Sequence[Group], support: Masks, values: Values, noise: float) -> Values:
    """The values ``[|X|]`` that fit the samples best, from those that peeling found; samples that several offsets see count once.

    Bins with more energy than ``noise`` hold what was not found, which would leak into the values: they are left out.
    """
    places = [group.hash(support) for group in groups]
    s = [signs(support, group.offsets[group.first]) for group in groups]
    left = subtract(u, groups, support, values)
    weights = [(energies(rest) <= noise)[at, None] for rest, at in zip(left, places, strict=True)]

    def adjoint(residuals: Sequence[Values]) -> Values:
        total: Values = sum((sk * w * r[at]).sum(axis=1) for sk, w, r, at in zip(s, weights, residuals, places, strict=True))
        return total

    def forward(x: Values) -> list[Values]:
        made = []
        for group, sk, at in zip(groups, s, places, strict=True):
            bins = np.zeros((group.bins, sk.shape[1]), dtype=x.dtype)
            add_rows(bins, at, x[:, None] * sk)
            made.append(bins)
        return made

    rest = adjoint([bins[:, group.first] for bins, group in zip(left, groups, strict=True)])
    change, direction, size = np.zeros_like(rest), rest, float(np.vdot(rest, rest).real)
    enough = (ENOUGH * float(np.linalg.norm(values)) * len(s)) ** 2
    for _ in range(STEPS):
        if size <= enough:
            break
        image = adjoint(forward(direction))
        step = size / float(np.vdot(direction, image).real)
        change = change + step * direction
        rest = rest - step * image
        now = float(np.vdot(rest, rest).real)
        direction, size = rest + now / size * direction, now
    fitted: Values = values + change
    return fitted
