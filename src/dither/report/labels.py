"""Labels beside marks, so that no two overlap.

Greedy: each label tries the places around its mark, near before far, and takes the first that is free; far labels get
a leader line. A label that finds no place is left out, and the caller falls back to a legend. O(n^2 c) for n labels
and c places.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

Point = tuple[float, float]


@dataclass(frozen=True)
class Box:
    """A rectangle in pixels, y downwards."""

    x0: float
    y0: float
    x1: float
    y1: float

    def overlaps(self, other: Box, gap: float = 0.0) -> bool:
        return (
            self.x0 < other.x1 + gap
            and other.x0 < self.x1 + gap
            and self.y0 < other.y1 + gap
            and other.y0 < self.y1 + gap
        )

    def inside(self, frame: Box) -> bool:
        return self.x0 >= frame.x0 and self.x1 <= frame.x1 and self.y0 >= frame.y0 and self.y1 <= frame.y1

    def crosses(self, a: Point, b: Point) -> bool:
        """Whether the segment from ``a`` to ``b`` meets the rectangle (Liang-Barsky clipping)."""
        t0, t1 = 0.0, 1.0
        dx, dy = b[0] - a[0], b[1] - a[1]
        for p, q in ((-dx, a[0] - self.x0), (dx, self.x1 - a[0]), (-dy, a[1] - self.y0), (dy, self.y1 - a[1])):
            if p == 0:
                if q < 0:
                    return False
                continue
            t = q / p
            if p < 0:
                t0 = max(t0, t)
            else:
                t1 = min(t1, t)
        return t0 <= t1


@dataclass(frozen=True)
class Label:
    """A text of ``width`` x ``height`` that belongs to the mark at ``(x, y)`` with ``radius``."""

    x: float
    y: float
    width: float
    height: float
    radius: float = 6.0


@dataclass(frozen=True)
class Placed:
    """Where a label went; ``leader`` is a line from the mark to it, if it stands apart."""

    box: Box
    leader: tuple[Point, Point] | None = None


def place(labels: Sequence[Label], obstacles: Sequence[Box], frame: Box, gap: float = 2.0) -> list[Placed | None]:
    """A place for each label, earlier ones first: inside ``frame``, off all ``obstacles`` (the marks), other labels
    and their leaders."""
    taken: list[Box] = []
    leaders: list[tuple[Point, Point]] = []
    result: list[Placed | None] = []
    for label in labels:
        others = [o for o in obstacles if not (o.x0 <= label.x <= o.x1 and o.y0 <= label.y <= o.y1)]
        chosen: Placed | None = None
        for option in _places(label):
            box = option.box
            if not box.inside(frame) or any(box.overlaps(o, gap) for o in (*obstacles, *taken)):
                continue
            if any(box.crosses(*line) for line in leaders):
                continue
            if option.leader is not None and any(t.crosses(*option.leader) for t in (*others, *taken)):
                continue
            chosen = option
            break
        if chosen is not None:
            taken.append(chosen.box)
            if chosen.leader is not None:
                leaders.append(chosen.leader)
        result.append(chosen)
    return result


def _places(label: Label) -> Iterator[Placed]:
    x, y, w, h, r = label.x, label.y, label.width, label.height, label.radius + 3
    yield Placed(Box(x + r, y - h / 2, x + r + w, y + h / 2))
    yield Placed(Box(x - r - w, y - h / 2, x - r, y + h / 2))
    yield Placed(Box(x - w / 2, y - r - h, x + w / 2, y - r))
    yield Placed(Box(x - w / 2, y + r, x + w / 2, y + r + h))
    for distance in (16, 24, 34, 46, 60, 76, 94):
        for angle in (0, -25, 25, -50, 50, -75, 75, 180, -155, 155, -130, 130, -105, 105):
            dx, dy = math.cos(math.radians(angle)), math.sin(math.radians(angle))
            end = (x + distance * dx, y + distance * dy)
            right = dx >= 0
            box = (
                Box(end[0] + 2, end[1] - h / 2, end[0] + 2 + w, end[1] + h / 2)
                if right
                else Box(end[0] - 2 - w, end[1] - h / 2, end[0] - 2, end[1] + h / 2)
            )
            start = (x + (label.radius + 1) * dx, y + (label.radius + 1) * dy)
            yield Placed(box, (start, end))
