"""The least squares of all samples on a found support.

The transform of a group is orthogonal up to its scale, so this is least squares of the bins: minimise sum over groups, bins and cosets of |U - model|^2, where the
model puts X_k s_k[p] into bin M^T k. Its normal equations are nearly a multiple of the identity, so conjugate gradients take a handful of steps of cost C P |X|.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dither.special.spright.gf2 import Masks, Values, signs
from dither.special.spright.hashing import Group
from dither.special.spright.peel import add_rows

STEPS = 50
ENOUGH = 1e-13  # of the right side's norm


def subtract(u: Sequence[Values], groups: Sequence[Group], support: Masks, values: Values) -> list[Values]:
    """Bins ``[B, P]`` of each group without the model's."""
    left = []
    for bins, group in zip(u, groups, strict=True):
        rest = bins.astype(np.result_type(bins, values))
        add_rows(rest, group.hash(support), -values[:, None] * signs(support, group.offsets))
        left.append(rest)
    return left


def refit(u: Sequence[Values], groups: Sequence[Group], support: Masks) -> Values:
    """The values ``[|X|]`` of the support that fit the samples best; samples that several offsets see count once."""
    places = [group.hash(support) for group in groups]
    s = [signs(support, group.offsets[group.first]) for group in groups]

    def adjoint(residuals: Sequence[Values]) -> Values:
        total: Values = sum((sk * r[at]).sum(axis=1) for sk, r, at in zip(s, residuals, places, strict=True))
        return total

    def forward(x: Values) -> list[Values]:
        made = []
        for group, sk, at in zip(groups, s, places, strict=True):
            bins = np.zeros((group.bins, sk.shape[1]), dtype=x.dtype)
            add_rows(bins, at, x[:, None] * sk)
            made.append(bins)
        return made

    weight = sum(sk.shape[1] for sk in s)  # the diagonal
    rest = adjoint([bins[:, group.first] for bins, group in zip(u, groups, strict=True)])
    target = float(np.linalg.norm(rest)) * ENOUGH
    x = rest / weight
    rest = rest - adjoint(forward(x))
    direction, size = rest, float(np.vdot(rest, rest).real)
    for _ in range(STEPS):
        if size <= target**2:
            break
        image = adjoint(forward(direction))
        step = size / float(np.vdot(direction, image).real)
        x = x + step * direction
        rest = rest - step * image
        now = float(np.vdot(rest, rest).real)
        direction, size = rest + now / size * direction, now
    return x
