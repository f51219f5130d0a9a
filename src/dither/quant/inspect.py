"""Looks at a model before anything is rounded: layers, proved sites, outliers, and where few bits will hurt.

For each layer, from a few calibration sequences of the float model:

    max / median    largest input channel's max |x| over the median channel's
    kurtosis        fourth standardised moment of the inputs and of the weights (3 for a Gaussian)
    RTN error       ||(W_hat - W) X||^2 / ||W X||^2 of round-to-nearest at 4, 3 and 2 bits

The engine does the walking: a recipe whose grid writes down what it is shown. Memory is the engine's: one block at a time, activations, and
what is kept of the model, whose throw-away codes have one bit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dither.formats import Int, Params, Scheme, channel
from dither.formats import group as groups_of
from dither.quant.calibration import Calibration
from dither.quant.engine import quantize
from dither.quant.machine import machine
from dither.quant.outcome import Event
from dither.quant.parts import Grid
from dither.quant.recipe import Recipe
from dither.quant.rounding.nearest import Nearest
from dither.quant.statistics import HESSIAN, MAX_ABS, ROWS, Statistics

WIDTHS = (4, 3, 2)


@dataclass(frozen=True)
class _Observe(Grid):
    """Writes down what it sees. A grid that needs statistics gets those of the float model's own activations (a rounding would get those
    of the model as rounded so far)."""

    needs: ClassVar[frozenset[str]] = frozenset({HESSIAN, MAX_ABS, ROWS})
    uses_sites: ClassVar[bool] = True
    size: int | None = 64
    seen: list[dict[str, Any]] = field(default_factory=list, compare=False, repr=False)

    def fit(self, weight: Tensor, scheme: Scheme, statistics: Statistics | None) -> Params:
        self.seen.append(observe(weight, statistics, self.size))
        return scheme.fit(weight)


def observe(weight: Tensor, statistics: Statistics | None, size: int | None) -> dict[str, Any]:
    """The figures of one layer; ``weight [O, I]``, ``size``: the group of the rounding errors (None: a row). Input figures are left out
    where no input was seen."""
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
    power = float(((weight @ hessian) * weight).sum())  # ||W X||^2 / T
    blocks = channel() if size is None else groups_of(size)
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
    model: str | Path | nn.Module,
    calibration: Calibration = None,
    *,
    group: int | None = 64,
    samples: int = 8,
    length: int = 512,
    seed: int = 0,
    tokenizer: Any = None,
    compute: torch.dtype | None = None,
    progress: Callable[[Event], None] | None = None,
) -> dict[str, Any]:
    """The inspection as plain data (see `report.records.InspectRecord`). Arguments are those of `quantize`; ``group`` is the one of the
    rounding errors (None: one scale a row). Raises what `quantize` raises."""
    observer = _Observe(size=group)
    recipe = Recipe((observer, Nearest()), Int(1) @ channel(), name="inspect")
    report = quantize(
        model,
        recipe,
        calibration,
        samples=samples,
        length=length,
        seed=seed,
        tokenizer=tokenizer,
        compute=compute,
        progress=progress,
    ).report
    sites: dict[str, list[str]] = {}
    for site in report.proved:
        for reader in site["readers"]:
            sites.setdefault(reader, []).append(site["site"])
    unproved = dict(line.split(": ", 1) for line in report.unproved)
    layers = [
        {
            "name": row.name,
            "block": row.block,
            "shape": row.shape,
            "sites": sites.get(row.name, []),
            "notes": [unproved[row.name]] if row.name in unproved else [],
            **figures,
        }
        for row, figures in zip(report.layers, observer.seen, strict=True)
    ]
    return {
        "model": type(model).__name__ if isinstance(model, nn.Module) else str(model),
        "calibration": _corpus(calibration, samples, length),
        "scheme": f"asymmetric integers, {'one scale a row' if group is None else f'group {group}'}",
        "seed": seed,
        "layers": layers,
        "notes": report.notes,
        **machine(),
    }


def _corpus(calibration: Calibration, samples: int, length: int) -> dict[str, Any]:
    """What the inputs were: drawn from text, or tokens and model inputs used as given."""
    drawn = {"windows": samples, "length": length}
    if calibration is None:
        return {"text": "embedded text", **drawn}
    if isinstance(calibration, Path):
        return {"text": calibration.name, **drawn}
    if isinstance(calibration, str):
        short = " ".join(calibration.split())
        return {"text": short if len(short) <= 60 else short[:57] + "...", **drawn}
    if isinstance(calibration, Tensor):
        whole = {"windows": calibration.shape[0], "length": calibration.shape[1]} if calibration.dim() == 2 else drawn
        return {"text": "given tokens", **whole}
    if isinstance(calibration, Mapping):
        return {"text": "given model inputs", "windows": 1}
    if isinstance(calibration, Sequence) and calibration and isinstance(calibration[0], Mapping):
        return {"text": "given model inputs", "windows": len(calibration)}
    texts = isinstance(calibration, Sequence) and calibration and isinstance(calibration[0], str | Path)
    return {"text": f"{len(calibration)} given texts" if texts else "given tokens", **(drawn if texts else {})}
