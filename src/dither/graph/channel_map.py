"""Test 2: multiply (or shift) a producer's channels by distinct amounts and read the channel map off the inputs of its readers.

Each column of each reader must change by the same factor at every token; the factors lie between 1/8 and 8 and are all different, so
a factor names its channel. Grouped-query attention shows up as a map in which each value channel appears several times. Readers
return what they returned before the change, so one pass tells about one stretch, and producers that share no
reader are changed together. A last pass is made on louder weights, where clamps and ReLU6 saturate.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from dither.graph.bench import PATIENCE, ROUNDS, Bench, Evidence, Source
from dither.graph.exact import randomize
from dither.graph.trace import Leaves, Read, Seen

SAME = 1e-9  # relative: two float64 numbers that should be equal
LOUD = 16.0  # gain of the weights in the last pass


@dataclass(eq=False)
class Found:
    """A source, the channels that may be rewritten, and for each reader which of them feeds each column (-1: none)."""

    source: Source
    rows: Tensor
    maps: dict[str, Tensor]


def map_channels(bench: Bench, candidates: dict[Source, Evidence]) -> tuple[list[Found], dict[Source, str]]:
    """The channel maps of the candidates that pass, and for the others why not."""
    pending = [_Mapping(bench, source, evidence) for source, evidence in candidates.items()]
    left, stalled = -1, 0
    for _ in range(ROUNDS):
        _turn(bench, [m for m in pending if m.open_columns], 1.0)
        before, left = left, sum(m.open_columns for m in pending)
        stalled = stalled + 1 if left == before else 0
        if left == 0 or stalled == PATIENCE:
            break
    _turn(bench, [m for m in pending if m.failure is None], LOUD)
    done, failed = [], {}
    for mapping in pending:
        result = mapping.found()
        failure = mapping.failure or _unvisited(bench, mapping.maps)
        failure = failure or (None if result.maps else "none of its channels was seen to reach a weight as it is")
        if failure is None:
            done.append(result)
        else:
            failed[mapping.source] = failure
    return done, failed


def _turn(bench: Bench, mappings: Sequence[_Mapping], gain: float) -> None:
    """Test these mappings on new random weights, those that read multiplied by ``gain``."""
    randomize(bench.module, bench.generator, louder=bench.matrices, gain=gain)
    base = bench.watch({})
    bench.note(base)
    for batch in _disjoint(mappings):
        _pass(bench, batch, base)


def _unvisited(bench: Bench, readers: Iterable[str]) -> str | None:
    for reader in readers:
        visited = bench.matrices[reader].visited
        if not bool(visited.all()):
            return f"{int((~visited).sum())} of {len(visited)} experts of {reader} saw no token of the sample"
    return None


@torch.no_grad()
def _pass(bench: Bench, batch: list[_Mapping], base: Seen) -> None:
    """Change these mappings' producers, run, and compare what every reader gets. A batch in which anything is wrong is done again
    one by one, since the fault may be a neighbour's."""
    saved = [m.state() for m in batch]
    leaves: dict[str, Leaves] = {}
    with _changed(bench, batch, leaves):
        now = bench.watch(leaves, replay=base)
    trouble = None
    ends = zip([*base.outputs, *base.cuts, *base.ranked], [*now.outputs, *now.cuts, *now.ranked], strict=True)
    if not all(_equal(x, y) for x, y in ends):
        trouble = "its channels also reach something that is no weight"
    for before, after in zip(base.reads, now.reads, strict=True):
        owner = next((m for m in batch if before.view.name in m.maps), None)
        if owner is not None:
            owner.compare(before, after)
        elif not _equal(before.x, after.x):
            trouble = f"its channels also reach {before.view.name}"
    if len(batch) == 1:
        batch[0].failure = batch[0].failure or trouble
    elif trouble or any(m.failure for m in batch):
        for mapping, state in zip(batch, saved, strict=True):
            mapping.restore(state)
            _pass(bench, [mapping], base)


@contextmanager
def _changed(bench: Bench, batch: Sequence[_Mapping], leaves: dict[str, Leaves]) -> Iterator[None]:
    """Producers multiplied or shifted by their mappings' values."""
    saved: dict[str, Tensor] = {}

    def change(name: str, values: Tensor) -> None:
        saved[name] = bench.parameter(name).clone()
        bench.parameter(name).copy_(values.view(bench.parameter(name).shape))

    for mapping in batch:
        source, values = mapping.source, mapping.values
        if source.vector:
            old = bench.parameter(source.parameter).flatten()
            change(
                source.parameter,
                old + values if source.kind == "shift" else (old + source.offset) * values - source.offset,
            )
        else:
            one, zero = torch.ones_like(values), torch.zeros_like(values)
            leaves[source.parameter] = Leaves(values, zero) if source.kind == "scale" else Leaves(one, values)
        if source.bias is not None and source.kind == "scale":
            change(source.bias, bench.parameter(source.bias).flatten() * values)
    try:
        yield
    finally:
        for name, old in saved.items():
            bench.parameter(name).copy_(old)


def _equal(x: Tensor, y: Tensor) -> bool:
    if x.shape != y.shape:
        return False
    difference = (x - y).abs()
    limit = SAME * float(torch.nan_to_num(x, 0.0, 0.0, 0.0).abs().max()) if x.numel() else 0.0
    return not bool((torch.nan_to_num(difference, 0.0) > limit).any())


def _disjoint(mappings: Sequence[_Mapping]) -> list[list[_Mapping]]:
    """Batches of mappings that reach no common reader, so that one pass serves them all."""
    batches: list[tuple[set[str], list[_Mapping]]] = []
    for mapping in mappings:
        reach = set(mapping.maps) | {mapping.source.parameter}
        for taken, batch in batches:
            if not taken & reach:
                taken |= reach
                batch.append(mapping)
                break
        else:
            batches.append((reach, [mapping]))
    return [batch for _, batch in batches]


class _Mapping:
    """One candidate's way through test 2."""

    def __init__(self, bench: Bench, source: Source, evidence: Evidence) -> None:
        self.source = source
        self.failure: str | None = None
        usable = bench.usable(source, evidence)
        self.rows = usable.nonzero().flatten()
        count = len(self.rows)
        order = torch.randperm(count, generator=bench.generator)
        steps = (2 * (torch.arange(count, dtype=torch.float64) + 0.5) / count - 1)[
            order
        ]  # distinct, never 0, within (-1, 1)
        if source.kind == "scale":
            self.signal = steps * math.log(8)  # logarithms of the factors
            self.values = torch.ones(len(evidence.alive), dtype=torch.float64)
            self.values[self.rows] = self.signal.exp()
        else:
            self.signal = steps
            self.values = torch.zeros(len(evidence.alive), dtype=torch.float64)
            self.values[self.rows] = self.signal
        if count % 2:  # the middle step of an odd count is 0, which would be no change
            middle = int(self.signal.abs().argmin())
            self.signal[middle] = 1.25 * (math.log(8) if source.kind == "scale" else 1.0)
            self.values[self.rows[middle]] = (
                self.signal[middle].exp() if source.kind == "scale" else self.signal[middle]
            )
        self.sorted, self.order = self.signal.sort()
        readers = [r for r, reach in evidence.reaches.items() if bool((reach & usable).any())]
        self.maps = {r: torch.full((bench.matrices[r].columns,), -1, dtype=torch.int64) for r in readers}
        self.known = {r: torch.zeros(bench.matrices[r].columns, dtype=torch.bool) for r in readers}

    def state(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        return {r: t.clone() for r, t in self.maps.items()}, {r: t.clone() for r, t in self.known.items()}

    def restore(self, state: tuple[dict[str, Tensor], dict[str, Tensor]]) -> None:
        self.failure = None
        self.maps, self.known = state

    @property
    def open_columns(self) -> int:
        return 0 if self.failure else sum(int((~k).sum()) for k in self.known.values())

    def found(self) -> Found:
        """The result, without channels that no reader turned out to read."""
        used = torch.zeros(len(self.rows) + 1, dtype=torch.bool)
        for mapped in self.maps.values():
            used[mapped] = True  # -1 marks the spare last entry
        used[-1] = False
        place = torch.where(used, used.cumsum(0) - 1, -1)
        return Found(
            self.source, self.rows[used[:-1]], {r: place[m] for r, m in self.maps.items() if bool((m >= 0).any())}
        )

    def compare(self, before: Read, after: Read) -> None:
        """Read one part of a channel map off the inputs of a reader before and after the change."""
        view = before.view
        width = view.inp
        if view.pads and self.source.kind == "shift":
            self.failure = f"{view.name} puts zeros around what it reads, which a bias cannot make up for"
            return
        x, y = before.x.reshape(-1, width), after.x.reshape(-1, width)
        if view.expert is None and view.experts > 1:
            rows = before.x.reshape(view.experts, -1, width), after.x.reshape(view.experts, -1, width)
            for e, (a, b) in enumerate(zip(*rows, strict=True)):
                self._compare(view.name, a, b, e * view.inputs + view.col)
        else:
            self._compare(view.name, x, y, (view.expert or 0) * view.inputs + view.col)

    def _compare(self, reader: str, x: Tensor, y: Tensor, start: int) -> None:
        if x.shape[0] == 0:
            return
        size = x.abs().amax(0)
        live = (size > 1e-150) & torch.isfinite(size)
        if self.source.kind == "scale":
            ratio = (x * y).sum(0) / (x * x).sum(0).clamp(min=torch.finfo(torch.float64).tiny)
            misfit = (y - ratio * x).abs().amax(0) > SAME * size
            bad = (misfit | (ratio <= 0)) & live
            signal = ratio.clamp(min=1e-300).log()
        else:
            live = torch.isfinite(size)
            signal = (y - x).mean(0)
            bad = (((y - x) - signal).abs().amax(0) > SAME * (size + 1)) & live
        if bool(bad.any()):
            self.failure = f"{reader} does not read its channels as they are"
            return
        place = torch.searchsorted(self.sorted, signal).clamp(max=len(self.sorted) - 1)
        lower = (place - 1).clamp(min=0)
        place = torch.where((self.sorted[lower] - signal).abs() < (self.sorted[place] - signal).abs(), lower, place)
        near = (self.sorted[place] - signal).abs() < 1e-9 * (1 + size if self.source.kind == "shift" else 1)
        silent = signal.abs() < 1e-9
        if bool((live & ~near & ~silent).any()):
            self.failure = f"{reader} reads a mixture of its channels"
            return
        index = torch.where(silent, -1, self.order[place])
        columns = slice(start, start + x.shape[1])
        known, mapped = self.known[reader][columns], self.maps[reader][columns]
        if bool((known & live & (mapped != index)).any()):
            self.failure = f"{reader} is run on several inputs that differ in where they come from"
            return
        mapped[live] = index[live]
        known |= live
