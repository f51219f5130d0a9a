"""Float formats by the names that people use: "fp4", "fp8", "mxfp4", "nvfp4", "e3m2"."""

from __future__ import annotations

import re

from dither.formats.floating import Float
from dither.formats.scheme import MXFP4, NVFP4, Scheme

ALIASES = {"fp4": "e2m1", "fp8": "e4m3"}
WHOLE = {"mxfp4": MXFP4, "nvfp4": NVFP4}  # names that say the scales and the groups too


def named_format(name: str, scale: str = "float16") -> Float:
    """The number format called ``name``; e5m2 has infinities, as in OCP's 8-bit floats, the others have none. Raises ValueError."""
    if name in WHOLE:
        found = WHOLE[name].format
        assert isinstance(found, Float)
        return found
    sizes = re.fullmatch(r"e(\d)m(\d)", ALIASES.get(name, name))
    if sizes is None:
        raise ValueError(f"must be int, {', '.join([*ALIASES, *WHOLE])} or like e3m2, not {name!r}")
    exponent, mantissa = int(sizes[1]), int(sizes[2])
    return Float(exponent, mantissa, finite=(exponent, mantissa) != (5, 2), scale=scale)


def named_scheme(name: str) -> Scheme | None:
    """The scheme, where ``name`` says more than the number format; None where it does not."""
    return WHOLE.get(name)
