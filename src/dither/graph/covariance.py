"""Test 1: which channels reach which readers in proportion, for all channels of all weights at once.

Let X [T, K] be what a weight reads, and m_c the multiplier of one producer's channel c, with everything cut behind the first weight that
reads (`trace`). X is *covariant* in c if channel c scales some columns K_c of X and does nothing else: dX_tk/dm_c = X_tk for k in K_c,
else 0 (Euler). Probing with

    u_tk = z_t X_tk / sum_t z_t X_tk^2,  z random > 0     gives     d(u . X)/dm_c = |K_c|,

a whole number that does not depend on z. Entries X_tk = 0 (behind a ReLU) drop out by themselves. A channel that gives anything else
is not covariant here, and may not be scaled. The same for shifts with sum_t u_tk = 1, and for the factor of a norm, whose rule
(``a + w``, a = 0 or 1) falls out of the same numbers: w G + b H = n - a G with G, H the gradients of factor and bias.

Cost: four backward passes for each tensor that is read, over the stretch since the reads before it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dither.graph.bench import PATIENCE, ROUNDS, Bench, Evidence, Source
from dither.graph.exact import randomize
from dither.graph.trace import Leaves, Seen

WHOLE = 1e-6  # how near to a whole number a count of columns must come


def explore(bench: Bench) -> dict[Source, Evidence]:
    """Evidence on every source, over as many draws of weights as it takes for every channel to be seen alive."""
    found: dict[Source, Evidence] = {}
    dead_before, stalled = -1, 0
    for turn in range(ROUNDS):
        randomize(bench.module, bench.generator)
        for name in bench.vectors:
            bench.parameter(name).requires_grad_(True)
        leaves: dict[str, Leaves] = {}
        seen = bench.watch(leaves, grad=True)
        bench.note(seen)
        attached = {bench.bias_of(name) for name in bench.matrices}
        _Backward(bench, seen, leaves, [v for v in bench.vectors if v not in attached]).collect(found)
        for name in bench.vectors:
            bench.parameter(name).requires_grad_(False)
        dead = _dead(bench, found)
        stalled = stalled + 1 if dead == dead_before else 0
        if turn > 0 and (
            dead == 0 or stalled == PATIENCE
        ):  # two looks in any case: a ReLU that never closed looks linear
            break
        dead_before = dead
    return found


def candidates(bench: Bench) -> dict[Source, Evidence]:
    """`explore`, then only the sources with a usable channel, and one of each pair (factor, bias) and (bias, factor): where a
    norm adds a bias, both are the same rewrite and look alike."""
    found = explore(bench)
    usable = {s: e for s, e in found.items() if bool(bench.usable(s, e).any())}
    added = {s.parameter for s in usable if s.kind == "shift" and s.vector}
    order = {n: i for i, n in enumerate(bench.vectors)}
    chosen: dict[tuple[str, frozenset[str | None]], Source] = {}
    for source in sorted(usable, key=lambda s: (s.parameter in added, order.get(s.parameter, -1))):
        pair = frozenset((source.parameter, source.bias))
        chosen.setdefault((source.kind, pair if source.vector else frozenset((source.parameter,))), source)
    return {s: usable[s] for s in chosen.values()}


def _dead(bench: Bench, found: dict[Source, Evidence]) -> int:
    dead = sum(int((~m.visited).sum()) for m in bench.matrices.values())
    for source, evidence in found.items():
        if not source.vector and source.kind == "scale":
            spoiled = bench.spoiled.get((source.parameter, "scale"), torch.zeros_like(evidence.alive))
            dead += int((~(evidence.alive | spoiled)).sum())
    return dead


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
        grads = torch.autograd.grad(list(outputs), self.tensors, list(probes), retain_graph=True, allow_unused=True)
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
        self,
        found: dict[Source, Evidence],
        readers: list[str],
        scale: list[dict[tuple[str, str], Tensor]],
        shift: list[dict[tuple[str, str], Tensor]],
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
        self,
        found: dict[Source, Evidence],
        readers: list[str],
        source: Source,
        key: tuple[str, str],
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

    def _add(
        self, found: dict[Source, Evidence], source: Source, readers: list[str], touched: Tensor, clean: Tensor
    ) -> None:
        self.bench.spoil(source.parameter, source.kind, touched & ~clean)
        found.setdefault(source, Evidence(torch.zeros_like(touched))).add(readers, touched, touched & clean)


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
