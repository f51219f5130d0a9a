"""Layers whose rows fall into slices with inputs of their own: stacks of experts (a slice an expert), grouped convolutions (a slice a group).

Each slice is a rounding problem by itself, with its own Hessian and its own grid; what comes of them is stored as one tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from dither.formats import QTensor, Scheme, WeightScheme
from dither.graph import Layer, Structure
from dither.quant.outcome import powers
from dither.quant.parts import Rounded
from dither.quant.statistics import HESSIAN, ROWS, Statistics


@dataclass(frozen=True)
class Place:
    """Where a pass over a block meets ``layers`` (names) that read one tensor. ``expert``: which slice of these stacks; None for layers that are
    modules, which are met once."""

    layers: tuple[str, ...]
    expert: int | None = None

    def modules(self, block: nn.Module, experts: Mapping[str, Sequence[nn.Module]]) -> list[nn.Module]:
        """What is called there. ``experts``: see `experts.opened`."""
        return [block.get_submodule(n) if self.expert is None else experts[n][self.expert] for n in self.layers]


def places(structure: Structure, block: nn.Module, schemes: dict[str, WeightScheme]) -> list[Place]:
    """The places of the layers in ``schemes``, in call order; experts run one after the other, each through all of its matrices. Layers whose
    slices cannot be rounded apart have none."""
    kept = [n for n, scheme in schemes.items() if is_separable(scheme) or slice_count(structure.layer(n), block) == 1]
    found: list[tuple[tuple[int, int, int], Place]] = []
    for names in structure.groups(kept):
        found.append(((structure.layer(names[0]).group, -1, -1), Place(tuple(names))))
    stacks: dict[str, dict[int, list[Layer]]] = {}  # by the module that holds them, by the tensor that they read
    for layer in structure.layers:
        if layer.kind == "experts" and layer.name in kept:
            owner = layer.parameter.rpartition(".")[0]
            stacks.setdefault(owner, {}).setdefault(layer.group, []).append(layer)
    for groups in stacks.values():
        first = min(groups)
        for group, layers in groups.items():
            for e in range(layers[0].shape[0]):
                found.append(((first, e, group), Place(tuple(x.name for x in layers), e)))
    return [place for _, place in sorted(found, key=lambda item: item[0])]


def rows_kept(count: int) -> int:
    """How many inputs of each of ``count`` slices are kept, where they are all gathered at once: together about as many as of another layer."""
    return max(64, 2048 // count)


def gathered_bytes(layer: Layer, needs: frozenset[str]) -> int:
    """What the statistics of all experts of a stack take together."""
    count, features = layer.shape[0], layer.in_features
    return count * features * ((8 * features if HESSIAN in needs else 0) + (4 * rows_kept(count) if ROWS in needs else 0))


def slice_count(layer: Layer, module: nn.Module) -> int:
    """How many slices a layer of ``module`` has: 1 for most."""
    if layer.kind == "experts":
        return layer.shape[0]
    owner = module.get_submodule(layer.name)
    return owner.groups if isinstance(owner, _ConvNd) else 1


def is_separable(scheme: WeightScheme) -> bool:
    """Whether rows are stored independently of each other, so that slices of a matrix can be rounded apart."""
    return isinstance(scheme, Scheme) and scheme.blocks.height == 1 and not scheme.tensor_scale


class Slices:
    """A layer ``weight [O, I]`` (all slices one after the other) on its way through ``count`` roundings."""

    def __init__(self, weight: Tensor, scheme: WeightScheme, count: int) -> None:
        self.weight, self.scheme = weight.view(count, -1, weight.shape[-1]), scheme
        self.rounded: dict[int, Rounded] = {}
        self._tokens = 0
        self._noise = self._signal = 0.0

    def put(self, k: int, rounded: Rounded, statistics: Statistics | None) -> Tensor:
        """What slice k was rounded to; returns its values ``[O / count, I]``."""
        self.rounded[k] = rounded
        decoded = rounded.tensor.dequantize(torch.float32)
        if statistics is not None:
            self._tokens += statistics.tokens
            if (measured := powers(self.weight[k], decoded, statistics)) is not None:
                self._noise, self._signal = self._noise + measured[0], self._signal + measured[1]
        return decoded

    def joined(self, rest: Callable[[Tensor], Rounded]) -> Rounded:
        """One tensor of all slices; ``rest(weight)`` rounds those whose input nobody saw."""
        assert isinstance(self.scheme, Scheme)
        count, rows, columns = self.weight.shape
        for k in range(count):
            if k not in self.rounded:
                self.rounded[k] = rest(self.weight[k])
        each = [self.rounded[k] for k in range(count)]
        params = {key: torch.cat([r.tensor.params[key] for r in each]) for key in each[0].tensor.params}
        tensor = QTensor.from_codes(torch.cat([r.tensor.codes for r in each]), params, self.scheme, (count * rows, columns))
        losses, damps = [r.loss for r in each if r.loss is not None], [r.damp for r in each if r.damp is not None]
        return Rounded(
            tensor,
            loss=sum(losses) if losses else None,
            damp=max(damps, default=None),
            fallback=_fallback([r.fallback for r in each]),
            facts={"slices": count},
        )

    @property
    def tokens(self) -> int:
        """Calibration tokens that a slice saw, on average."""
        return self._tokens // len(self.weight)

    @property
    def output_error(self) -> float | None:
        """As `LayerReport.output_error`, over all slices."""
        return self._noise / self._signal if self._signal > 0 else None


def _fallback(each: list[str | None]) -> str | None:
    """What to say of slices that were rounded otherwise than asked."""
    said = [text for text in each if text is not None]
    if not said or said == [said[0]] * len(each):
        return said[0] if said else None
    return f"{len(said)} of {len(each)} slices: {said[0]}"
