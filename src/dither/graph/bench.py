"""The bench on which proofs are made: a float64 copy of a module with random weights, and what its watched runs have shown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from dither.graph.exact import Call, execute, float_outputs
from dither.graph.trace import Leaves, Parameters, Read, Seen, Trace, View

ROUNDS = 12  # most draws of random weights that are tried until every channel was seen alive
PATIENCE = 3  # draws without a channel newly alive after which the rest is taken to be dead


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
        self.spoiled: dict[
            tuple[str, str], Tensor
        ] = {}  # (parameter, "scale" or "shift") -> channels that must stay as they are
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
        self.tables |= seen.tables
        per_reader: dict[str, list[Read]] = {}
        for read in seen.reads:
            per_reader.setdefault(read.view.name, []).append(read)
        for name, reads in per_reader.items():
            view = reads[0].view
            known = self.matrices.setdefault(name, Matrix(view, torch.zeros(view.experts, dtype=torch.bool)))
            self.inputs.setdefault(name, tuple(dict.fromkeys(r.source for r in reads)))
            bias = seen.biases.get(name)
            if bias is not None and self.parameter(bias).numel() == view.outputs * view.experts:
                self.biases[name] = bias
            for read in reads:
                if read.x.numel():
                    known.visited[slice(None) if read.view.expert is None else read.view.expert] = True

    def bias_of(self, weight: str) -> str | None:
        """The bias of a weight: what was added in the same call, or the only vector of its module that fits its rows."""
        if weight in self.biases:
            return self.biases[weight]
        view = self.matrices[weight].view
        owner = weight.rpartition(".")[0]
        size = view.outputs * view.experts
        fits = [n for n in self.vectors if n.rpartition(".")[0] == owner and self.parameter(n).numel() == size]
        return fits[0] if len(fits) == 1 and fits[0] != weight else None

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


def _is_vector(module: nn.Module, name: str, p: Tensor) -> bool:
    """One entry a channel: a factor or a bias, or the biases ``[E, O]`` of a stack of experts."""
    if p.numel() == max(p.shape, default=0):
        return p.numel() > 1
    mates = module.get_submodule(name.rpartition(".")[0])._parameters.values()
    return p.dim() == 2 and any(
        m is not None and m.dim() == 3 and m.shape[0] == p.shape[0] and p.shape[1] in m.shape for m in mates
    )
