"""Logarithms of the modified Bessel functions, log I_v(x) and log K_v(x), and their ratios to a neighbouring order, in float64.

Each pair (v, x) belongs to a region with an expression of its own (`bessel_reference`). The kernel classifies a chunk of pairs, sorts them by region
so that no vector holds two expressions, and runs each region in whole vectors: from 60 (Hankel, three terms) to about 600 (trapezoidal rule)
multiply-adds a pair, with two logarithms and no division by zero, overflow or underflow in between. Every instruction set does the same operations
in the same order; AVX2 and AVX-512 agree in every bit, scalar rounds products on the way, and results depend neither on threads nor on neighbours.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dither.kernels.bessel_reference import bessel_reference, classify
from dither.kernels.bessel_shapes import GAMMA_TERMS, LOG_STEPS, NODES, REGIONS, TERMS, BesselTables
from dither.kernels.checks import check
from dither.kernels.extension import extension, isa, threads

__all__ = ["GAMMA_TERMS", "LOG_STEPS", "NODES", "REGIONS", "TERMS", "BesselTables", "LogBessel", "log_bessel"]


class LogBessel(NamedTuple):
    """``value [N]``, and ``ratio [N]`` where it was asked for: I_{v+1} / I_v, or K_{v-1} / K_v."""

    value: Tensor
    ratio: Tensor | None


def log_bessel(
    kind: str, v: Tensor, x: Tensor, tables: BesselTables, *, regions: Tensor | None = None, ratio: bool = False, sort: bool = True
) -> LogBessel:
    """log of I_v(x) (``kind="I"``) or K_v(x) (``"K"``) for ``v, x [N]`` float64.

    ``regions [N]`` uint8 chooses the expressions (indices into `REGIONS`; by default `classify`'s); a pair outside an expression's range then gets an
    inaccurate value. ``ratio`` gives the ratio too. ``sort=False`` evaluates every expression on every pair and selects, in torch: no wait for the
    device, many times the work. NaN for NaN, negative x and negative v; the limits at 0 and infinity. Tables must lie on the device of v and x.
    """
    if kind not in ("I", "K"):
        raise ValueError(f"kind: must be 'I' or 'K', not {kind!r}")
    check("v", v, (None,), (torch.float64,))
    check("x", x, (v.shape[0],), (torch.float64,))
    if regions is not None:
        check("regions", regions, (v.shape[0],), (torch.uint8,))
        if regions.numel() and int(regions.max()) >= len(REGIONS):
            raise ValueError(f"regions: holds {int(regions.max())}, must be below {len(REGIONS)}")
    shapes = {"u": (TERMS, TERMS + 1), "w": (TERMS, TERMS + 1), "gamma": (GAMMA_TERMS,), "logs": (3, LOG_STEPS + 1), "nodes": (NODES, 2)}
    for name, table in tables._asdict().items():
        check(f"tables.{name}", table, shapes[name], (torch.float64,))
    v, x = v.detach(), x.detach()
    native = extension() if v.device.type == "cpu" and sort else None
    if native is None:
        return LogBessel(*bessel_reference(kind, v, x, tables, classify(v, x) if regions is None else regions, ratio, sort))
    value, second = torch.empty_like(v), torch.empty_like(v) if ratio else None
    native.log_bessel(kind == "K", v, x, regions, *tables, value, second, isa(), threads())
    return LogBessel(value, second)
