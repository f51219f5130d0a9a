"""Which block sizes are fastest on this device for a problem: tried once, remembered for the process.

Every plan runs a few times on the call's own tensors, each time behind a write that empties the L2 cache, as a layer finds it while a model runs.
Some ten milliseconds a problem beside compiling. While a CUDA graph is captured nothing can be timed: a problem that is new then takes the first
plan, which is therefore listed as the one that is never bad.
"""

from __future__ import annotations

import logging
import statistics
from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dither.kernels.gpu.presence import interpreted

logger = logging.getLogger("dither")
ROUNDS = 9
_chosen: dict[Hashable, Plan] = {}


class Plan(NamedTuple):
    """How a product is cut: ``kind`` names the kernel, blocks are of outputs, tokens and columns, ``parts`` of the columns run side by side."""

    kind: str
    block_o: int = 64
    block_t: int = 16
    block_k: int = 128
    parts: int = 1
    warps: int = 4
    stages: int = 3


def fastest(key: Hashable, plans: Sequence[Plan], run: Callable[[Plan], Tensor]) -> Plan:
    """The fastest of ``plans`` for the problems that ``key`` names. Plans that this device cannot run (too much shared memory) are passed over;
    RuntimeError where none is left."""
    if (known := _chosen.get(key)) is not None:
        return known
    if interpreted() or len(plans) == 1:
        return plans[0]
    if torch.cuda.is_current_stream_capturing():
        return plans[0]
    times: dict[Plan, float] = {}
    flush = torch.empty(2 * torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size, dtype=torch.uint8, device="cuda")
    for plan in plans:
        try:
            run(plan)
            times[plan] = _milliseconds(plan, run, flush)
        except Exception as error:
            if not _too_large(error):
                raise
            logger.debug("%s: %s does not fit this device (%s)", key, plan, error)
    if not times:
        raise RuntimeError(f"no plan for {key} fits this device")
    _chosen[key] = min(times, key=times.__getitem__)
    return _chosen[key]


def chosen() -> dict[Hashable, Plan]:
    """What was found so far."""
    return dict(_chosen)


def _milliseconds(plan: Plan, run: Callable[[Plan], Tensor], flush: Tensor) -> float:
    """Median of a call that finds an empty cache."""
    def event() -> torch.cuda.Event:
        return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]

    events = [(event(), event()) for _ in range(ROUNDS)]
    for begin, end in events:
        flush.zero_()
        begin.record()
        run(plan)
        end.record()
    torch.cuda.synchronize()
    return statistics.median(float(begin.elapsed_time(end)) for begin, end in events)


def _too_large(error: Exception) -> bool:
    from triton.compiler.errors import CompileTimeAssertionFailure
    from triton.runtime.errors import OutOfResources, PTXASError

    return isinstance(error, (OutOfResources, PTXASError, CompileTimeAssertionFailure))
