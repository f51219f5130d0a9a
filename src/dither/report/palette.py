"""Colours and marker shapes, for light and dark backgrounds.

The series follow Okabe and Ito's set that people with any common colour blindness tell apart, darkened or lightened
until each has a contrast of at least 3:1 (WCAG 1.4.11) on its background; text has at least 4.5:1 (WCAG 1.4.3). No
series relies on its colour: each has its own shape too. The heat scale is one hue whose lightness runs away from the
background, so more ink means more error in both modes.
"""

from __future__ import annotations

import math

LIGHT = {
    "bg": "#ffffff",
    "panel": "#f6f7f9",
    "ink": "#1b1f24",
    "soft": "#57606a",
    "line": "#d5dae0",
    "grid": "#e9ecef",
    "accent": "#0b62a8",
    "bad": "#b3261e",
    "mark": "#edf4fb",
    "s0": "#0072b2",
    "s1": "#c8500a",
    "s2": "#008560",
    "s3": "#a8457f",
    "s4": "#9a6a00",
    "s5": "#2a8cc4",
    "s6": "#5b5f66",
}
DARK = {
    "bg": "#14171b",
    "panel": "#1c2126",
    "ink": "#e8eaed",
    "soft": "#a3abb5",
    "line": "#3a424b",
    "grid": "#282e35",
    "accent": "#6cb6ff",
    "bad": "#ff8a80",
    "mark": "#1b2a39",
    "s0": "#4aa8e0",
    "s1": "#f0813a",
    "s2": "#2fc49a",
    "s3": "#e08bbd",
    "s4": "#e6a823",
    "s5": "#9fd4f5",
    "s6": "#a9afb8",
}
COLOURS = 7
HEAT_STEPS = 10
_HEAT_LIGHT = ("#eaf1f8", "#5b9bd0", "#08254a")
_HEAT_DARK = ("#1f2a35", "#2f7fc0", "#d6ecff")


def heat(anchors: tuple[str, str, str]) -> list[str]:
    """``HEAT_STEPS`` colours along the three anchors, interpolated in sRGB."""
    rgb = [[int(a[i : i + 2], 16) for i in (1, 3, 5)] for a in anchors]
    steps = []
    for k in range(HEAT_STEPS):
        t = 2 * k / (HEAT_STEPS - 1)
        lo, hi, part = (rgb[0], rgb[1], t) if t <= 1 else (rgb[1], rgb[2], t - 1)
        steps.append("#" + "".join(f"{round(a + (b - a) * part):02x}" for a, b in zip(lo, hi, strict=True)))
    return steps


def contrast(a: str, b: str) -> float:
    """The WCAG contrast ratio of two ``#rrggbb`` colours, 1 to 21."""
    lights = []
    for colour in (a, b):
        channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        lights.append(0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2])
    return (max(lights) + 0.05) / (min(lights) + 0.05)


def css() -> str:
    """The colours as CSS variables: light, dark by the reader's setting, dark by choice, light on paper."""
    light = _block(LIGHT, heat(_HEAT_LIGHT)) + "color-scheme:light"
    dark = _block(DARK, heat(_HEAT_DARK)) + "color-scheme:dark"
    series = "".join(f".s{i}{{fill:var(--s{i})}}" for i in range(COLOURS))
    cells = "".join(f".h{i}{{fill:var(--h{i})}}" for i in range(HEAT_STEPS))
    return (
        f":root{{{light}}}\n@media screen and (prefers-color-scheme:dark){{:root:not([data-theme=light]){{{dark}}}}}\n"
        f"@media screen{{:root[data-theme=dark]{{{dark}}}}}\n{series}{cells}\n"
    )


def _block(colours: dict[str, str], cells: list[str]) -> str:
    named = colours | {f"h{i}": c for i, c in enumerate(cells)}
    return "".join(f"--{name}:{value};" for name, value in named.items())


def shape(index: int, x: float, y: float, r: float = 5.5) -> str:
    """SVG path data of the ``index``-th marker shape around ``(x, y)``; all have about the area of a disc of radius
    ``r``."""
    kind = index % 8
    if kind == 0:
        return f"M{x - r:.2f} {y:.2f}a{r:.2f} {r:.2f} 0 1 0 {2 * r:.2f} 0a{r:.2f} {r:.2f} 0 1 0 {-2 * r:.2f} 0z"
    if kind == 5:  # a plus
        a, b = 1.05 * r, 0.42 * r
        corners = [
            (-b, -a),
            (b, -a),
            (b, -b),
            (a, -b),
            (a, b),
            (b, b),
            (b, a),
            (-b, a),
            (-b, b),
            (-a, b),
            (-a, -b),
            (-b, -b),
        ]
    elif kind == 7:  # a five-pointed star
        corners = [_polar(1.45 * r if k % 2 == 0 else 0.6 * r, -90 + 36 * k) for k in range(10)]
    else:
        count, turn, scale = {1: (4, 45, 1.25), 2: (3, -90, 1.4), 3: (4, 0, 1.3), 4: (3, 90, 1.4), 6: (6, 0, 1.12)}[
            kind
        ]
        corners = [_polar(scale * r, turn + 360 * k / count) for k in range(count)]
    return "M" + "L".join(f"{x + dx:.2f} {y + dy:.2f}" for dx, dy in corners) + "z"


def _polar(radius: float, degrees: float) -> tuple[float, float]:
    return radius * math.cos(math.radians(degrees)), radius * math.sin(math.radians(degrees))
