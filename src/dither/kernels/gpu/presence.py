"""Whether Triton is here. It is no dependency: without it, CUDA tensors take torch's own operations, and dither says so once.

``TRITON_INTERPRET=1``, set before the kernels are first used, runs them on the CPU in Triton's interpreter: slowly, for tests.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import logging
import os
from contextlib import AbstractContextManager

import torch
from torch import Tensor

logger = logging.getLogger("dither")


@functools.cache
def has_triton() -> bool:
    """Whether Triton can be imported. The first time that it cannot, a line says what this costs."""
    if _installed():
        return True
    logger.warning("dither decodes few-bit weights on the GPU at each use, which is slower: its GPU kernels need triton (pip install triton)")
    return False


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET", "") not in ("", "0")


def check_device(name: str, *tensors: Tensor | None) -> None:
    """Raises ValueError unless all tensors are where kernels can reach them, on one device; RuntimeError without Triton."""
    devices = {t.device for t in tensors if t is not None}
    if len(devices) > 1:
        raise ValueError(f"{name}: tensors on {' and '.join(sorted(map(str, devices)))}, must be on one device")
    kind = next(iter(devices)).type
    if kind != "cuda" and not (kind == "cpu" and interpreted()):
        raise ValueError(f"{name}: tensors on {kind}, must be on a CUDA device")
    if not _installed():
        raise RuntimeError(f"{name}: needs triton, which is not installed (pip install triton)")


def on_device(x: Tensor) -> AbstractContextManager[object]:
    """Within it, kernels start on the device of ``x``."""
    if x.device.type != "cuda" or x.device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(x.device)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """How many programs the device runs at once, at least; 132 (an H100) in the interpreter, so that tests cut problems as a device would."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def has_float8(device: torch.device) -> bool:
    """Whether the device multiplies float8: NVIDIA's capability 8.9 (Ada), 9.0 (Hopper) and later."""
    if device.type != "cuda":
        return device.type == "cpu" and interpreted()
    about = torch.cuda.get_device_properties(device)  # a constant to torch.compile
    return (about.major, about.minor) >= (8, 9)
