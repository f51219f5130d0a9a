"""How large the processor's caches are, which decides between algorithms that move memory and algorithms that do not."""

from __future__ import annotations

import functools
import os
from pathlib import Path

CACHES = Path("/sys/devices/system/cpu/cpu0/cache")  # of Linux: a folder a cache, with what it is in files
USUAL = {1: 32 << 10, 2: 1 << 20, 3: 16 << 20}  # where the system does not say
UNITS = {"K": 10, "M": 20, "G": 30}


@functools.cache
def cache_bytes(level: int, caches: Path = CACHES) -> int:
    """Bytes of the data cache of ``level`` 1, 2 or 3 that the first core reaches: as the system says, else a usual size. Of a cache that several
    cores share it is all of it. ValueError for other levels."""
    if level not in USUAL:
        raise ValueError(f"level: must be 1, 2 or 3, not {level}")
    return _listed(level, caches) or _configured(level) or USUAL[level]


def _listed(level: int, caches: Path) -> int:
    """From Linux's folder; 0 where there is none. What the C library says is wrong where several caches of a level are in a socket."""
    for folder in sorted(caches.glob("index*")):
        try:
            kind, found, size = ((folder / name).read_text().strip() for name in ("type", "level", "size"))
            if kind in ("Data", "Unified") and int(found) == level:
                return int(size.rstrip("KMG")) << UNITS.get(size[-1:], 0)
        except (OSError, ValueError):  # half a description is none
            continue
    return 0


def _configured(level: int) -> int:
    """From the C library; 0 where it does not know."""
    name = f"SC_LEVEL{level}_{'DCACHE' if level == 1 else 'CACHE'}_SIZE"
    return max(os.sysconf(name), 0) if name in getattr(os, "sysconf_names", {}) else 0
