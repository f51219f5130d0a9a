"""The Pareto front: the points that no other point beats in one coordinate without losing in the other."""

from __future__ import annotations

import math
from collections.abc import Sequence


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the undominated points, both coordinates the smaller the better, in order of the first.

    A point is dominated if another is at most equal in both coordinates and smaller in one; equal points are kept
    together. Points that are not finite are never on the front and dominate nothing. O(n log n).
    """
    finite = [i for i, (x, y) in enumerate(points) if math.isfinite(x) and math.isfinite(y)]
    finite.sort(key=lambda i: (points[i], i))
    front: list[int] = []
    for i in finite:
        x, y = points[i]
        if not front or y < points[front[-1]][1] or (x, y) == tuple(points[front[-1]]):
            front.append(i)
    return front
