"""What a process that is to do long work sets for itself, before torch is loaded. Imports no torch."""

from __future__ import annotations

import ctypes
import gc
import os
import sys

# Read by torch and its thread pool when they load. Long work alternates between wide and narrow stretches: threads that spin for some
# microseconds and then sleep leave their processor time to others, and activations that come and go in huge pages cost a tenth of the page
# faults. What the user has set stands.
ENVIRONMENT = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "300", "THP_MEM_ALLOC_ENABLE": "1"}


def prepare_for_long_work() -> None:
    """Threads that sleep while they wait, huge pages, memory that is kept once freed, and fewer searches for garbage."""
    for variable, value in ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    _reuse_freed_memory()
    gc.set_threshold(20_000, 20, 50)  # imports and graphs make many objects that stay


def _reuse_freed_memory() -> None:
    """Let the C library keep what long work frees, for its next tensors: glibc would hand it back to the system block by block, and have
    every page cleared again. Costs some tens of megabytes of peak memory."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        trim_threshold, mmap_threshold = -1, -3  # of malloc.h
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(mmap_threshold, 32 << 20)  # the most that glibc takes
