"""Looks at a model before anything is rounded: layers, proved sites, outliers, and where few bits will hurt.

For each layer, from a few calibration sequences of the float model:

    max / median    largest input channel's max |x| over the median channel's
    kurtosis        fourth standardised moment of the inputs and of the weights (3 for a Gaussian)
    RTN error       ||(W_hat - W) X||^2 / ||W X||^2 of round-to-nearest at 4, 3 and 2 bits
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from dither.formats import Int, channel, group
from dither.quant.compare import machine
from dither.quant.engine import Calibration, quantize
from dither.quant.outcome import Event, Quantized
from dither.quant.parts import Rounded, Rounding
from dither.quant.recipe import Recipe
from dither.quant.rounding.nearest import nearest
from dither.quant.statistics import HESSIAN, MAX_ABS, ROWS, Statistics

WIDTHS = (4, 3, 2)


@dataclass(frozen=True)
class _Observe(Rounding):
    """Rounds to 8 bits (so that inputs stay those of the float model) and writes down what it sees."""

    uses_sites: ClassVar[bool] = True
    seen: list[dict[str, Any]] = field(default_factory=list, compare=False, repr=False)
    size: int | None = 64
    needs: ClassVar[frozenset[str]] = frozenset({HESSIAN, MAX_ABS, ROWS})

    def round(self, weight: Tensor, scheme: Any, params: Any, statistics: Statistics | None) -> Rounded:
        self.seen.append(observe(weight, statistics, self.size))
        return Rounded(nearest(weight, scheme, params))


def observe(weight: Tensor, statistics: Statistics | None, size: int | None) -> dict[str, Any]:
    """The figures of one layer; ``weight [O, I]``. Input figures are left out where no input was seen."""
    found: dict[str, Any] = {"weight_kurtosis": kurtosis(weight), "weight_absmax": float(weight.abs().max())}
    if statistics is None or statistics.tokens == 0:
        return found
    peaks = statistics.max_abs
    median = float(peaks.median())
    found |= {
        "input_max_over_median": float(peaks.max()) / median if median > 0 else None,
        "input_kurtosis": kurtosis(statistics.rows),
        "input_absmax": float(peaks.max()),
        "rtn_error": {},
    }
    hessian = statistics.hessian.float()
    power = float(((weight @ hessian) * weight).sum())
    blocks = channel() if size is None else group(size)
    for bits in WIDTHS:
        difference = (Int(bits) @ blocks).quantize(weight) - weight
        found["rtn_error"][bits] = float(((difference @ hessian) * difference).sum()) / power if power > 0 else 0.0
    return found


def kurtosis(x: Tensor) -> float | None:
    """Fourth standardised moment of all values; None where they do not vary."""
    centred = x.double() - x.double().mean()
    variance = float(centred.square().mean())
    return float(centred.pow(4).mean()) / variance**2 if variance > 0 else None


def inspect(
    model: Any,
    calibration: Calibration = None,
    *,
    group: int | None = 64,
    samples: int = 8,
    length: int = 512,
    seed: int = 0,
    progress: Callable[[Event], None] | None = None,
) -> dict[str, Any]:
    """The inspection as plain data (see `report.records.InspectRecord`). Raises what `quantize` raises."""
    observer = _Observe(size=group)
    recipe = Recipe((observer,), Int(8) @ channel(), name="inspect")
    result: Quantized = quantize(model, recipe, calibration, None, samples=samples, length=length, seed=seed, progress=progress)
    sites: dict[str, list[str]] = {}
    for site in result.report.proved:
        for reader in site["readers"]:
            sites.setdefault(reader, []).append(site["site"])
    unproved = dict(line.split(": ", 1) for line in result.report.unproved)
    layers = [
        {
            "name": row.name,
            "block": row.block,
            "shape": row.shape,
            "sites": sites.get(row.name, []),
            "notes": [unproved[row.name]] if row.name in unproved else [],
            **figures,
        }
        for row, figures in zip(result.report.layers, observer.seen, strict=True)
    ]
    return {
        "model": str(model) if not isinstance(model, torch.nn.Module) else type(model).__name__,
        "calibration": {"text": _text(calibration), "windows": samples, "length": length},
        "scheme": f"asymmetric integers, {'one scale a row' if group is None else f'group {group}'}",
        "seed": seed,
        "layers": layers,
        "notes": result.report.notes,
        **machine(),
    }


def _text(calibration: Calibration) -> str:
    if calibration is None:
        return "embedded text"
    name = getattr(calibration, "name", None)
    return str(name) if name else str(calibration)[:60] if isinstance(calibration, str) else "given tokens"
