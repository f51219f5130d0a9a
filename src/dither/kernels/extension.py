"""The compiled extension ``dither.kernels._C``, where there is one.

It is optional: an installation without a compiler lacks it, and every function of `dither.kernels` then takes its torch
reference and says so once. Two environment variables, read at every call, choose by hand:

    DITHER_KERNELS=reference            the torch references
    DITHER_ISA=scalar|avx2|avx512       an instruction set; ValueError where the processor lacks it
"""

from __future__ import annotations

import functools
import importlib
import logging
import os
from typing import Any

import torch

logger = logging.getLogger("dither")


@functools.cache
def _load() -> Any | None:
    try:
        return importlib.import_module("dither.kernels._C")  # after torch, so that both share one OpenMP library
    except ImportError as error:
        logger.warning("dither runs on its torch reference kernels, which are slower: no C++ extension (%s)", error)
        return None


def extension() -> Any | None:
    """The compiled module, or None where the references are to be used."""
    choice = os.environ.get("DITHER_KERNELS", "")
    if choice not in ("", "auto", "reference"):
        raise ValueError(f"DITHER_KERNELS={choice}: must be auto or reference")
    return None if choice == "reference" else _load()


def isa() -> str:
    """The instruction set asked for by ``DITHER_ISA``; empty for the best."""
    return os.environ.get("DITHER_ISA", "")


def threads() -> int:
    """As many as torch uses: both share one pool."""
    return torch.get_num_threads()


def backend() -> str:
    """What runs: ``"avx512"``, ``"avx2"``, ``"scalar"`` or ``"reference"``."""
    module = extension()
    return "reference" if module is None else str(module.isa(isa()))
