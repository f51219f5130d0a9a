"""What methods that scale channels share: what a site's readers see, and folding a scale so that the statistics follow."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dither.graph import Consumer, Site, apply_scale
from dither.graph.fold import column_view
from dither.quant.parts import BlockView
from dither.quant.statistics import Statistics


def seen_by(block: BlockView, reader: Consumer, what: Callable[[Statistics], Tensor], pool: Callable[[Tensor], Tensor]) -> Tensor | None:
    """``what(statistics) [I]`` of a reader's columns, in the order of its ``channel_map`` (``[S * I]`` of a layer of S slices, zeros for slices that
    nothing reached); ``pool`` joins the k columns that a convolution has for a channel, ``[I, k] -> [I]``. None where nothing was gathered."""
    columns = reader.channel_map.numel()
    if (statistics := block.statistics.get(reader.layer or "")) is not None:
        return pool(what(statistics).view(columns, -1))
    slices = block.slices.get(reader.layer or "")
    if not slices:
        return None
    count = column_view(block.module.get_parameter(reader.parameter), reader).shape[0]
    found = torch.zeros(count, columns // count)
    for k, statistics in slices.items():
        found[k] = pool(what(statistics).view(columns // count, -1))
    return found.view(-1)


def fold_scale(block: BlockView, site: Site, scale: Tensor) -> None:
    """Fold ``scale [C]`` at a site; from then on the readers' statistics are those of their new inputs."""
    apply_scale(block.module, site, scale)
    done: set[int] = set()
    for reader in site.consumers:
        columns = reader.expand(scale)
        statistics = block.statistics.get(reader.layer or "")
        if statistics is not None and id(statistics) not in done:  # readers of one tensor share their statistics
            done.add(id(statistics))
            statistics.rescale(columns)
        slices = block.slices.get(reader.layer or "", {})
        if slices:
            each = columns.view(column_view(block.module.get_parameter(reader.parameter), reader).shape[0], -1)
            for k, statistics in slices.items():
                if id(statistics) not in done:
                    done.add(id(statistics))
                    statistics.rescale(each[k])


def largest_weights(block: BlockView, site: Site, readers: Sequence[Consumer]) -> Tensor:
    """``[C]``: the largest ``|W|`` in the columns that a producer channel feeds."""
    most = torch.zeros(site.channels)
    for reader in readers:
        weight = column_view(block.module.get_parameter(reader.parameter), reader)  # [S, O, I, k]
        most = torch.maximum(most, reader.peak(weight.abs().amax((1, 3)).reshape(-1).float(), site.channels))
    return most
