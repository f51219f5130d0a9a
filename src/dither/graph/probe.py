"""The proofs: which channels of which weight can be scaled or shifted, and what would absorb it.

Two tests, both on a float64 copy with random weights, with the graph cut at every weight that reads (`trace`):

1. Backward. Let X [T, K] be what a weight reads, and m_c the multiplier of one producer's channel c. X is *covariant* in c if channel c
   scales some columns K_c of X and nothing else: dX_tk/dm_c = X_tk for k in K_c, else 0 (Euler). Probing with

       u_tk = z_t X_tk / sum_t z_t X_tk^2,  z random > 0     gives     d(u . X)/dm_c = |K_c|,

   a whole number that does not depend on z, at one backward pass for *all* channels of *all* weights. Entries X_tk = 0 (behind a ReLU)
   drop out by themselves. A channel that gives anything else is not covariant here, and may not be scaled. The same for shifts with
   sum_t u_tk = 1, and for the factor of a norm, whose rule (``a + w``, a = 0 or 1) falls out of the same numbers: w G + b H = n - a G.
2. Forward. The channels that are left are multiplied by distinct factors between 1/8 and 8; each column of each reader must be scaled
   by the same factor at every token, and that factor names its channel: the channel map.

What is found is then folded into weights and must leave every output unchanged (`verify`).
Cost: for W weights, about 4 W backward and W forward passes over the stretch between two reads, plus a few runs of the module.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from dither.graph.exact import Call, execute, float_outputs, randomize
from dither.graph.trace import Leaves, Parameters, Read, Seen, Trace, View

ROUNDS = 12  # most draws of random weights that are tried until every channel was seen alive
PATIENCE = 3  # draws without a channel newly alive after which the rest is taken to be dead
WHOLE = 1e-6  # how near to a whole number a count of columns must come
SAME = 1e-9  # relative: two float64 numbers that should be equal
LOUD = 16.0  # gain of the weights in the last forward test, so that activations that saturate (ReLU6, clamps) do


@dataclass(eq=False)
class Evidence:
    """Which channels ``[C]`` of one source reach some reader covariantly, and which reach each reader at all."""

    alive: Tensor
    reaches: dict[str, Tensor] = field(default_factory=dict)

    def add(self, readers: Sequence[str], touched: Tensor, clean: Tensor) -> None:
        self.alive |= clean
        for reader in readers:
            self.reaches[reader] = self.reaches.get(reader, torch.zeros_like(touched)) | touched


@dataclass(frozen=True)
class Source:
    """A producer that might work: a weight (``vector`` False) or an elementwise factor, with the bias that goes with it."""

    parameter: str
    kind: str  # of the rewrite: "scale" or "shift"
    vector: bool
    bias: str | None = None
    offset: float = 0.0


@dataclass(eq=False)
class Found:
    """A source, the channels that may be rewritten, and for each reader which of them feeds each column (-1: none)."""

    source: Source
    rows: Tensor
    maps: dict[str, Tensor]


@dataclass(eq=False)
class Matrix:
    """A weight that was read: all that is known of its shape, and which experts saw a token."""

    view: View
    visited: Tensor  # [E] bool

    @property
    def columns(self) -> int:
        return self.view.inputs * self.view.experts


class Bench:
    """A float64 module with random weights, the calls to run it on, and the modules whose outputs end a stretch (blocks)."""

    def __init__(self, module: nn.Module, calls: Sequence[Call], cuts: Sequence[nn.Module], seed: int) -> None:
        self.module, self.calls, self.cuts = module, calls, cuts
        self.generator = torch.Generator().manual_seed(seed)
        self.parameters = Parameters(module)
        self.matrices: dict[str, Matrix] = {}  # in order of first read
        self.biases: dict[str, str] = {}
        self.tables: set[str] = set()
        self.inputs: dict[str, tuple[tuple[int, ...], ...]] = {}  # reader -> which tensor it read in the first run
        self.routes: set[str] = set()
        self.logits: set[str] = set()
        self.leaving: set[str] = set()  # weights with a channel that reaches the module's own output
        self.reached: set[str] = set()  # readers that some producer reaches
        self.spoiled: dict[tuple[str, str], Tensor] = {}  # (parameter, "scale" or "shift") -> channels that must stay as they are
        self.vectors = [n for n, p in module.named_parameters() if p.is_floating_point() and _is_vector(module, n, p)]

    # -- running ----------------------------------------------------------------------------------------------------

    def watch(self, leaves: dict[str, Leaves], *, grad: bool = False, replay: Seen | None = None) -> Seen:
        """One watched run of all calls."""
        trace = Trace(self.parameters, leaves, grad=grad, replay=replay)
        handles = [m.register_forward_hook(lambda _m, _a, out: trace.cut(out)) for m in self.cuts]
        try:
            with torch.set_grad_enabled(grad), trace:
                trace.seen.outputs = float_outputs(execute(self.module, self.calls))
        finally:
            for handle in handles:
                handle.remove()
        return trace.seen

    def parameter(self, name: str) -> Tensor:
        return self.module.get_parameter(name)

    def note(self, seen: Seen) -> None:
        """Remember what a run showed of the weights."""
        self.biases |= seen.biases
        self.tables |= seen.tables
        per_reader: dict[str, list[Read]] = {}
        for read in seen.reads:
            per_reader.setdefault(read.view.name, []).append(read)
        for name, reads in per_reader.items():
            view = reads[0].view
            known = self.matrices.setdefault(name, Matrix(view, torch.zeros(view.experts, dtype=torch.bool)))
            self.inputs.setdefault(name, tuple(dict.fromkeys(r.source for r in reads)))
            for read in reads:
                if read.x.numel():
                    known.visited[slice(None) if read.view.expert is None else read.view.expert] = True

    def bias_of(self, weight: str) -> str | None:
        """The bias of a weight: what was added in the same call, or the only vector of its module that fits its rows."""
        if weight in self.biases:
            return self.biases[weight]
        view = self.matrices[weight].view
        owner = weight.rpartition(".")[0]
        mates = self.module.get_submodule(owner)._parameters
        fits = [n for n, p in mates.items() if p is not None and p.numel() == view.outputs * view.experts]
        full = [f"{owner}.{n}" if owner else n for n in fits]
        return full[0] if len(full) == 1 and full[0] != weight else None

    def partners(self, vector: str) -> list[str | None]:
        """Vectors of the same module and size that may be the bias added after ``vector``, and None."""
        owner = vector.rpartition(".")[0]
        size = self.parameter(vector).numel()
        mates = [n for n in self.vectors if n.rpartition(".")[0] == owner and n != vector]
        return [None, *(n for n in mates if self.parameter(n).numel() == size)]

    def spoil(self, parameter: str, kind: str, channels: Tensor) -> None:
        self.spoiled[parameter, kind] = self.spoiled.get((parameter, kind), torch.zeros_like(channels)) | channels

    def usable(self, source: Source, evidence: Evidence) -> Tensor:
        """Channels ``[C]`` of a source that test 1 lets through."""
        good = evidence.alive
        for key in ((source.parameter, source.kind), (source.bias or "", "leak")):
            if key in self.spoiled:
                good = good & ~self.spoiled[key]
        return good

    # -- test 1: backward -------------------------------------------------------------------------------------------

    def explore(self) -> dict[Source, Evidence]:
        """Evidence on every source, over as many draws of weights as it takes for every channel to be seen alive."""
        found: dict[Source, Evidence] = {}
        dead_before, stalled = -1, 0
        for turn in range(ROUNDS):
            randomize(self.module, self.generator)
            for name in self.vectors:
                self.parameter(name).requires_grad_(True)
            leaves: dict[str, Leaves] = {}
            seen = self.watch(leaves, grad=True)
            self.note(seen)
            attached = {self.bias_of(name) for name in self.matrices}
            _Backward(self, seen, leaves, [v for v in self.vectors if v not in attached]).collect(found)
            for name in self.vectors:
                self.parameter(name).requires_grad_(False)
            dead = self._dead(found)
            stalled = stalled + 1 if dead == dead_before else 0
            if turn > 0 and (dead == 0 or stalled == PATIENCE):  # two looks in any case: a ReLU that never closed looks linear
                break
            dead_before = dead
        return found

    def candidates(self) -> dict[Source, Evidence]:
        """`explore`, then only the sources with a usable channel, and one of each pair (factor, bias) and (bias, factor): where a
        norm adds a bias, both are the same rewrite and look alike."""
        found = self.explore()
        usable = {s: e for s, e in found.items() if bool(self.usable(s, e).any())}
        added = {s.parameter for s in usable if s.kind == "shift" and s.vector}
        order = {n: i for i, n in enumerate(self.vectors)}
        chosen: dict[tuple[str, frozenset[str | None]], Source] = {}
        for source in sorted(usable, key=lambda s: (s.parameter in added, order.get(s.parameter, -1))):
            pair = frozenset((source.parameter, source.bias))
            chosen.setdefault((source.kind, pair if source.vector else frozenset((source.parameter,))), source)
        return {s: usable[s] for s in chosen.values()}

    def _dead(self, found: dict[Source, Evidence]) -> int:
        dead = sum(int((~m.visited).sum()) for m in self.matrices.values())
        for source, evidence in found.items():
            if not source.vector and source.kind == "scale":
                spoiled = self.spoiled.get((source.parameter, "scale"), torch.zeros_like(evidence.alive))
                dead += int((~(evidence.alive | spoiled)).sum())
        return dead

    # -- test 2: forward --------------------------------------------------------------------------------------------

    def map_channels(self, candidates: dict[Source, Evidence]) -> tuple[list[Found], dict[Source, str]]:
        """The channel maps of the candidates that pass, and for the others why not."""
        pending = [_Mapping(self, source, evidence) for source, evidence in candidates.items()]
        left, stalled = -1, 0
        for _ in range(ROUNDS):
            self._turn([m for m in pending if m.open_columns], 1.0)
            before, left = left, sum(m.open_columns for m in pending)
            stalled = stalled + 1 if left == before else 0
            if left == 0 or stalled == PATIENCE:
                break
        self._turn([m for m in pending if m.failure is None], LOUD)
        done, failed = [], {}
        for mapping in pending:
            result = mapping.found()
            failure = mapping.failure or self._unvisited(mapping.maps)
            failure = failure or (None if result.maps else "none of its channels was seen to reach a weight as it is")
            if failure is None:
                done.append(result)
            else:
                failed[mapping.source] = failure
        return done, failed

    def _turn(self, mappings: Sequence[_Mapping], gain: float) -> None:
        """Test these mappings on new random weights, those that read multiplied by ``gain``."""
        randomize(self.module, self.generator, louder=self.matrices, gain=gain)
        base = self.watch({})
        self.note(base)
        for batch in _disjoint(mappings):
            self._pass(batch, base)

    def _unvisited(self, readers: Iterable[str]) -> str | None:
        for reader in readers:
            visited = self.matrices[reader].visited
            if not bool(visited.all()):
                return f"{int((~visited).sum())} of {len(visited)} experts of {reader} saw no token of the sample"
        return None

    @torch.no_grad()
    def _pass(self, batch: list[_Mapping], base: Seen) -> None:
        leaves: dict[str, Leaves] = {}
        with self._changed([m for m in batch if m.failure is None], leaves):
            now = self.watch(leaves, replay=base)
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
        if trouble and len(batch) > 1:
            for mapping in batch:
                self._pass([mapping], base)
        elif trouble:
            batch[0].failure = batch[0].failure or trouble

    @contextmanager
    def _changed(self, batch: Sequence[_Mapping], leaves: dict[str, Leaves]) -> Iterator[None]:
        """Producers multiplied or shifted by their mappings' values."""
        saved: dict[str, Tensor] = {}

        def change(name: str, values: Tensor) -> None:
            saved[name] = self.parameter(name).clone()
            self.parameter(name).copy_(values.view(self.parameter(name).shape))

        for mapping in batch:
            source, values = mapping.source, mapping.values
            if source.vector:
                old = self.parameter(source.parameter).flatten()
                change(source.parameter, old + values if source.kind == "shift" else (old + source.offset) * values - source.offset)
            else:
                one, zero = torch.ones_like(values), torch.zeros_like(values)
                leaves[source.parameter] = Leaves(values, zero) if source.kind == "scale" else Leaves(one, values)
            if source.bias is not None and source.kind == "scale":
                change(source.bias, self.parameter(source.bias).flatten() * values)
        try:
            yield
        finally:
            for name, old in saved.items():
                self.parameter(name).copy_(old)


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
        steps = (2 * (torch.arange(count, dtype=torch.float64) + 0.5) / count - 1)[order]  # distinct, never 0, within (-1, 1)
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
            self.values[self.rows[middle]] = self.signal[middle].exp() if source.kind == "scale" else self.signal[middle]
        self.sorted, self.order = self.signal.sort()
        readers = [r for r, reach in evidence.reaches.items() if bool((reach & usable).any())]
        self.maps = {r: torch.full((bench.matrices[r].columns,), -1, dtype=torch.int64) for r in readers}
        self.known = {r: torch.zeros(bench.matrices[r].columns, dtype=torch.bool) for r in readers}

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
        return Found(self.source, self.rows[used[:-1]], {r: place[m] for r, m in self.maps.items() if bool((m >= 0).any())})

    def compare(self, before: Read, after: Read) -> None:
        """Read one part of a channel map off the inputs of a reader before and after the change."""
        view = before.view
        width = view.inp
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


class _Backward:
    """Test 1 on one watched run."""

    def __init__(self, bench: Bench, seen: Seen, leaves: dict[str, Leaves], vectors: list[str]) -> None:
        self.bench, self.seen, self.leaves, self.vectors = bench, seen, leaves, vectors
        self.parameters = {n: bench.parameter(n) for n in bench.vectors}
        self.names: list[tuple[str, str]] = []
        self.tensors: list[Tensor] = []
        for name, leaf in leaves.items():
            self.names += [(name, "scale"), (name, "shift")]
            self.tensors += [leaf.scale, leaf.shift]
        for name, p in self.parameters.items():
            self.names.append((name, "vector"))
            self.tensors.append(p)

    def collect(self, found: dict[Source, Evidence]) -> None:
        """Add this run's evidence on every source to ``found``."""
        for readers, parts in self._sinks():
            scale = [self._gradients(parts, [_scale_probe(x, self.bench.generator) for x in parts]) for _ in range(2)]
            shift = [self._gradients(parts, [_shift_probe(x, self.bench.generator) for x in parts]) for _ in range(2)]
            if scale[0]:
                self.bench.reached.update(readers)
            self._weigh(found, readers, scale, shift)
        self._leaks(self.seen.outputs, self.bench.leaving)
        self._leaks(self.seen.cuts, set())
        self._leaks(self.seen.ranked, self.bench.routes)
        self.bench.logits |= {name for name, kind in self._reach(self.seen.logits) if kind == "scale"}

    def _sinks(self) -> list[tuple[list[str], list[Tensor]]]:
        """Weights that read the same tensors, and those tensors."""
        per_reader: dict[str, dict[tuple[object, ...], Tensor]] = {}
        for read in self.seen.reads:
            if read.x.requires_grad and read.x.numel():
                key = (read.source, read.view.expert, read.view.col)
                per_reader.setdefault(read.view.name, {})[key] = read.x
        groups: dict[tuple[object, ...], tuple[list[str], list[Tensor]]] = {}
        for name, parts in per_reader.items():
            groups.setdefault(tuple(parts), ([], list(parts.values())))[0].append(name)
        return list(groups.values())

    def _gradients(self, outputs: Sequence[Tensor], probes: Sequence[Tensor]) -> dict[tuple[str, str], Tensor]:
        grads = torch.autograd.grad(
            list(outputs), self.tensors, list(probes), retain_graph=True, allow_unused=True
        )
        return {key: g.detach().flatten() for key, g in zip(self.names, grads, strict=True) if g is not None}

    def _reach(self, ends: Sequence[Tensor]) -> dict[tuple[str, str], Tensor]:
        """Gradients of a random mixture of ``ends``: which channels reach them at all."""
        ends = [t for t in ends if t.requires_grad and t.numel()]
        if not ends:
            return {}
        draw = self.bench.generator
        weights = [torch.randn(t.shape, generator=draw, dtype=torch.float64) * torch.isfinite(t) for t in ends]
        clean = [torch.nan_to_num(t, 0.0, 0.0, 0.0) for t in ends]
        return {k: g for k, g in self._gradients(clean, weights).items() if bool((g != 0).any())}

    def _leaks(self, ends: Sequence[Tensor], names: set[str]) -> None:
        """Channels that reach ``ends`` without passing a weight must stay as they are; ``names`` collects their weights."""
        for (name, kind), g in self._reach(ends).items():
            if kind == "scale":
                names.add(name)
            for spoiled in ("scale", "shift", "leak") if kind == "vector" else (kind,):
                self.bench.spoil(name, spoiled, g != 0)

    def _weigh(
        self, found: dict[Source, Evidence], readers: list[str],
        scale: list[dict[tuple[str, str], Tensor]], shift: list[dict[tuple[str, str], Tensor]],
    ) -> None:
        for name in self.leaves:
            self._weigh_shift(found, readers, Source(name, "shift", False), (name, "shift"), shift)
            if (name, "scale") not in scale[0]:
                continue
            bias = self.bench.bias_of(name)
            counts = [g[name, "scale"] for g in scale]
            if bias in self.parameters and all((bias, "vector") in g for g in scale):
                b = self.parameters[bias].detach().flatten()
                counts = [c + b * g[bias, "vector"] for c, g in zip(counts, scale, strict=True)]
            touched = torch.stack([g[name, "scale"] != 0 for g in scale]).any(0) | (counts[0] != 0)
            self._add(found, Source(name, "scale", False, bias), readers, touched, _whole(*counts))
        for name in self.vectors:
            self._weigh_shift(found, readers, Source(name, "shift", True), (name, "vector"), shift)
            if (name, "vector") in scale[0]:
                self._weigh_vector(found, readers, name, scale)

    def _weigh_shift(
        self, found: dict[Source, Evidence], readers: list[str], source: Source, key: tuple[str, str],
        grads: list[dict[tuple[str, str], Tensor]],
    ) -> None:
        if key in grads[0]:
            counts = [g[key] for g in grads]
            self._add(found, source, readers, (counts[0] != 0) | (counts[1] != 0), _whole(*counts))

    def _weigh_vector(
        self, found: dict[Source, Evidence], readers: list[str], name: str, scale: list[dict[tuple[str, str], Tensor]]
    ) -> None:
        """Solve w G + b H = n - a G for the count n and the offset a of a norm's factor, over channels and probes."""
        w = self.parameters[name].detach().flatten()
        gains = [g[name, "vector"] for g in scale]
        touched = (gains[0] != 0) | (gains[1] != 0)
        for bias in self.bench.partners(name):
            if bias is not None and not all((bias, "vector") in g for g in scale):
                continue
            known = []
            for gain, g in zip(gains, scale, strict=True):
                offset = 0.0 if bias is None else self.parameters[bias].detach().flatten() * g[bias, "vector"]
                known.append(w * gain + offset)
            solved = _solve_offset([k[touched] for k in known], [g[touched] for g in gains])
            if solved is None:
                continue
            counts = [k + solved * g for k, g in zip(known, gains, strict=True)]
            self._add(found, Source(name, "scale", True, bias, solved), readers, touched, _whole(*counts))
            return
        self.bench.spoil(name, "scale", touched)  # it reaches these readers, but not as a factor

    def _add(self, found: dict[Source, Evidence], source: Source, readers: list[str], touched: Tensor, clean: Tensor) -> None:
        self.bench.spoil(source.parameter, source.kind, touched & ~clean)
        found.setdefault(source, Evidence(torch.zeros_like(touched))).add(readers, touched, touched & clean)


def _is_vector(module: nn.Module, name: str, p: Tensor) -> bool:
    """One entry a channel: a factor or a bias, or the biases ``[E, O]`` of a stack of experts."""
    if p.numel() == max(p.shape, default=0):
        return p.numel() > 1
    mates = module.get_submodule(name.rpartition(".")[0])._parameters.values()
    return p.dim() == 2 and any(m is not None and m.dim() == 3 and m.shape[0] == p.shape[0] and p.shape[1] in m.shape for m in mates)


def _whole(first: Tensor, second: Tensor) -> Tensor:
    """Where both are the same whole number >= 1."""
    near = first.round()
    return (near >= 1) & ((first - near).abs() <= WHOLE * near) & ((second - near).abs() <= WHOLE * near)


def _scale_probe(x: Tensor, generator: torch.Generator) -> Tensor:
    """``u = z x / sum_t z x^2`` for ``x [..., K]``, z one random positive number a row."""
    rows = x.detach().reshape(-1, x.shape[-1])
    z = torch.rand(rows.shape[0], 1, generator=generator, dtype=torch.float64) + 0.05
    total = (z * rows * rows).sum(0)
    return torch.where(total > 0, z * rows / total.clamp(min=torch.finfo(torch.float64).tiny), 0.0).view(x.shape)


def _shift_probe(x: Tensor, generator: torch.Generator) -> Tensor:
    """Random u with ``sum_t u = 1`` for each column of ``x [..., K]``."""
    rows = x.detach().reshape(-1, x.shape[-1])
    z = torch.rand(rows.shape, generator=generator, dtype=torch.float64) + 0.05
    return (z / z.sum(0)).view(x.shape)


def _solve_offset(known: list[Tensor], gains: list[Tensor]) -> float | None:
    """The a of ``known = n - a gain`` where one (n, a) explains all channels with a whole n >= 1; None otherwise."""
    y, g = torch.cat(known), torch.cat(gains)
    if len(y) < 4:
        return None
    spread = g - g.mean()
    power = float((spread * spread).sum())
    if power <= 1e-24 * float((g * g).sum()):
        return None
    a = -float((spread * (y - y.mean())).sum()) / power
    a = round(a) if abs(a - round(a)) < WHOLE else a
    n = y + a * g
    count = float(n.mean().round())
    return a if count >= 1 and bool(((n - count).abs() <= WHOLE * count).all()) else None
