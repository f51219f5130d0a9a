"""Records as strict JSON, which every reader takes: JSON has no infinity and no NaN, so these become strings, as reports write them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def strict(value: Any) -> Any:
    """``value`` as plain JSON data: tuples are lists, keys and paths are strings, non-finite floats are "Infinity", "-Infinity" and
    "NaN". Raises TypeError for what has no JSON form."""
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        if math.isfinite(value):
            return value
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, Mapping):
        return {str(key): strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [strict(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{type(value).__name__} has no JSON form: {value!r}")


def dumps(value: Any, indent: int | None = None) -> str:
    """``value`` as strict JSON text."""
    return json.dumps(strict(value), indent=indent, allow_nan=False)
