"""RepQ's scale reparameterization: norm outputs quantized channel by channel, run with one grid for the whole layer.

Li, Xiao, Yang, Gu; ICCV 2023; arXiv 2212.08254, section 3.2.

Each channel j of a norm's output X gets its own b-bit grid  q = clamp(round(X_j / s_j) + z_j, 0, 2^b - 1); the layer is to have one grid,
s~ = mean_j s_j,  z~ = round(mean_j z_j).  With r1 = s / s~ and r2 = z - z~:

    gamma <- gamma / r1      beta <- (beta + s r2) / r1      b <- b - W (s r2)      W <- W diag(r1)          (b with the old W)

Then X' / s~ = X / s + r2, and as r2 is whole, round(X' / s~) + z~ = round(X / s) + z: the codes are the same integers, the activation error is
what it was channel by channel, and the float function has not changed. What has: W' = W diag(r1) is harder to round than W.

(The paper's code keeps z~ as a float mean, so that its codes are not the same; ours are.) Channels that hold one value have no grid of their own:
s_j is floored at 1e-8 of the layer's largest, so that W' ignores the channel and b carries it, and z_j does not count for z~. A site without a
shift (a norm without bias, or a reader that takes none) gets symmetric grids, z = 0, and only r1.

The ranges come from `statistics.rows`: at most 2048 rows (tokens) evenly strided over the calibration data. Time: O(R D log R) a site.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from dither.errors import SiteError
from dither.formats import Int, Params, tensor
from dither.formats.quantiles import free_affine, quantile_search
from dither.graph import Consumer, Site, apply_scale, apply_shift
from dither.quant.inputs import InputQuant
from dither.quant.parts import BlockView, Transform
from dither.quant.statistics import MEAN, ROWS

FLOOR = 1e-8  # of a channel's scale, relative to the layer's largest
SEARCHES = ("quantile", "minmax")


@dataclass(frozen=True)
class ChannelGrids:
    """``scale [D]``, ``zero [D]`` (whole numbers) of each channel, float64; and those of the layer, ``(s~, z~)``, s~ a float32 number."""

    scale: Tensor
    zero: Tensor
    layer_scale: float
    layer_zero: float

    @property
    def r1(self) -> Tensor:
        return self.scale / self.layer_scale

    @property
    def shift(self) -> Tensor:
        """s r2 ``[D]``: what is added to the channels."""
        return self.scale * (self.zero - self.layer_zero)


def channel_grids(rows: Tensor, bits: int, search: str = "quantile", *, symmetric: bool = False) -> ChannelGrids:
    """``rows [R, D]`` -> the grid of each channel and of the layer. ValueError for no rows, or an unknown ``search``."""
    if search not in SEARCHES:
        raise ValueError(f"search must be one of {', '.join(SEARCHES)}, not {search!r}")
    if rows.shape[0] == 0:
        raise ValueError("channel_grids: no rows")
    if not bool(torch.isfinite(rows).all()):
        raise ValueError("the calibration data gives activations that are NaN or inf")
    x = rows.double().T.contiguous()  # (D, R)
    constant = x.amin(-1) == x.amax(-1)
    fmt = Int(bits, sym="full" if symmetric else False, scale="float32")
    make = fmt.params if symmetric else free_affine(bits)
    params = _fit(x, fmt, make, search, symmetric)
    scale = params["scale"].double()
    if symmetric:  # a channel of one value is like any other: it has a largest magnitude
        constant = x.abs().amax(-1) == 0
    largest = scale[~constant].max() if bool((~constant).any()) else scale.new_ones(())
    scale = torch.where(constant, torch.zeros_like(scale), scale).clamp(min=float(largest) * FLOOR)
    zero = torch.zeros_like(scale) if symmetric else torch.where(constant, (-x[:, 0] / scale).round(), params["zero_point"])
    counted = zero[~constant] if bool((~constant).any()) else torch.zeros(1, dtype=torch.float64)
    return ChannelGrids(scale, zero, float(scale.mean().float()), float(counted.mean().round()))


def _fit(x: Tensor, fmt: Int, make: Any, search: str, symmetric: bool) -> Params:
    if search == "minmax":
        lo, hi = fmt.range(x) if symmetric else (x.amin(-1), x.amax(-1))
        return dict(make(lo, hi))
    return quantile_search(x, fmt, None if symmetric else make)


@dataclass(frozen=True)
class Reparameterise(Transform):
    """At every proved site norm -> linear layers of which some are to be quantized. ``bits``: of the layers' inputs; ``search``: how ranges are
    found, "quantile" or "minmax". Fixes how the readers' inputs are rounded. Raises SiteError where a block has no such site."""

    bits: int = 4
    search: str = "quantile"
    needs: ClassVar[frozenset[str]] = frozenset({MEAN, ROWS})

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise ValueError(f"bits must be 2 to 8, not {self.bits}")
        if self.search not in SEARCHES:
            raise ValueError(f"search must be one of {', '.join(SEARCHES)}, not {self.search!r}")

    def captures(self, block: BlockView) -> Collection[str]:
        return ()

    def apply(self, block: BlockView) -> None:
        done = False
        for site in block.structure.sites:
            readers = [c for c in site.consumers if c.layer in block.statistics and c.layer in block.schemes]
            if site.kind != "scale" or not site.producer.is_vector or not readers:
                continue
            if not _one_to_one(site):
                block.notes.append(f"{block.name}: {site.producer.name}: its channels are not the readers' columns, so it gets one range")
                continue
            self._rewrite(block, site, _shift_of(block, site), readers)
            done = True
        if not done and block.schemes:
            raise SiteError(
                f"{block.name}: no norm is proved to feed only linear layers, so there is nothing to reparameterise; set reparameterise=False"
            )

    def _rewrite(self, block: BlockView, site: Site, shift: Site | None, readers: list[Consumer]) -> None:
        first = readers[0]
        statistics = block.statistics[first.layer or ""]
        rows = torch.empty_like(statistics.rows)
        rows[:, first.channel_map] = statistics.rows  # by producer channel
        grids = channel_grids(rows, self.bits, self.search, symmetric=shift is None)
        if shift is not None:
            apply_shift(block.module, shift, -grids.shift)
        apply_scale(block.module, site, grids.r1)
        quant = _layer_quant(grids, self.bits, symmetric=shift is None)
        moved: set[int] = set()
        for reader in readers:
            name = reader.layer or ""
            block.inputs[name] = quant
            statistics = block.statistics[name]
            if id(statistics) not in moved:  # readers of one tensor share their statistics
                moved.add(id(statistics))
                if shift is not None:
                    statistics.shift(reader.expand(-grids.shift, fill=0.0).float())
                statistics.rescale(reader.expand(grids.r1).float())
        ranges = rows.amax(0) - rows.amin(0)
        median = float(ranges.median())
        block.findings.append(
            {
                "site": f"{block.name}: {site.producer.name} -> {', '.join(c.name for c in site.consumers)}",
                "ratio": float(ranges.max()) / median if median > 0 else None,
                "scale": grids.layer_scale,
                "zero_point": grids.layer_zero,
                "r1_min": float(grids.r1.min()),
                "r1_max": float(grids.r1.max()),
                "rows": rows.shape[0],
                "symmetric": shift is None,
            }
        )


def _layer_quant(grids: ChannelGrids, bits: int, *, symmetric: bool) -> InputQuant:
    params = {"scale": torch.full((1, 1), grids.layer_scale)}
    if symmetric:
        return InputQuant(Int(bits, sym="full", scale="float32") @ tensor(), params)
    return InputQuant(Int(bits, scale="float32") @ tensor(), params | {"zero_point": torch.full((1, 1), grids.layer_zero)})


def _one_to_one(site: Site) -> bool:
    """Whether each reader's columns are the producer's channels, each once."""
    every = torch.arange(site.channels)
    maps = [c.channel_map for c in site.consumers]
    return all(m.numel() == site.channels and torch.equal(m.sort().values, every) for m in maps)


def _shift_of(block: BlockView, site: Site) -> Site | None:
    """The site that shifts the same channels of the same readers; None where there is none, or where a bias would have to be made that has no
    place in the checkpoint: only layers that are to be quantized may gain one."""
    names = {c.parameter for c in site.consumers}
    for other in block.structure.sites:
        same = other.kind == "shift" and other.producer.parameter == site.producer.bias
        if same and {c.parameter for c in other.consumers} == names and torch.equal(other.producer.rows, site.producer.rows):
            quantized = {c.parameter for c in site.consumers if c.layer in block.schemes and c.kind == "linear"}
            return other if all(c.bias is not None or c.parameter in quantized for c in other.consumers) else None
    return None
