"""Block reconstruction: learns the rounding of all layers of a block together, so that the block returns what the float block returns.

BRECQ (Li et al., ICLR 2021, arXiv 2102.05426) with the two streams of FlexRound's code (arXiv 2306.00317): the block f runs on inputs x~ as
the rounded model gives them, and aims at the float block's outputs y in the float model,

    L = mean over sequences and features of sum_t (f(x~)_t - y_t)^2          padding left out

by Adam under a cosine, over shuffled mini-batches of ``batch`` sequences. How rounding is made differentiable is a part of its own
(`soft.Softening`). Norms, biases and everything else that stays float is not trained. What is judged, and kept, are the *codes as they will be
stored*: at the start, five times on the way, and at the end, on at most ``judged`` sequences; straight-through descent is not monotone.

Time: a step is one forward and one backward pass of the block over ``batch`` sequences plus some twenty passes over its weights. Memory:
about 30 bytes a weight of the block (see the softenings), its activations for one mini-batch, and the two streams that the engine holds.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from torch.func import functional_call

from dither import models
from dither.formats import Params, QTensor, Scheme, WeightScheme
from dither.graph import Layer
from dither.quant.attention import cheap_attention
from dither.quant.linear import as_stored
from dither.quant.parts import BlockRounding, BlockView, Rounded
from dither.quant.rounding.columns import Columns
from dither.quant.rounding.flexround import Division
from dither.quant.rounding.learned import check_knobs, movement, started
from dither.quant.rounding.nearest import nearest
from dither.quant.rounding.soft import Descent, Diverged, Kept, Softening, SoftRounding
from dither.quant.statistics import HESSIAN, Statistics
from dither.quant.walker import Call, hidden, run

LOOKS = 5  # how often the codes themselves are judged
SAME = 0.02  # relative difference between rows run alone and among others: bfloat16 noise is below

State = tuple[Tensor, Params]


@dataclass(frozen=True)
class Reconstruct(BlockRounding):
    """``soft``: how rounding is made differentiable; ``steps``, ``lr``: of Adam under a cosine; ``batch``: sequences (images) a step;
    ``judged``: sequences that codes are judged on; ``keep_best``: the best codes judged, the start included, rather than the last; ``start``:
    "nearest", or "gptq" (each layer's codes by `columns` on the float model's activations)."""

    soft: Softening = field(default_factory=Division)
    steps: int = 500
    lr: float = 3e-3
    batch: int = 2
    judged: int = 16
    keep_best: bool = True
    start: str = "nearest"

    def __post_init__(self) -> None:
        check_knobs(self.steps, self.lr, self.start)
        for name, value in (("batch", self.batch), ("judged", self.judged)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
        if self.start == "gptq":
            object.__setattr__(self, "needs", frozenset({HESSIAN}))

    @property
    def float_inputs(self) -> bool:
        return True

    def refuses(self, scheme: WeightScheme) -> str | None:
        return self.soft.refuses(scheme)

    def round(self, weight: Tensor, scheme: Scheme, params: Params, statistics: Statistics | None) -> Rounded:
        why = "it is not called as a module of its block"
        if self.start == "gptq" and statistics is not None:
            found = Columns().round(weight, scheme, params, statistics)
            return replace(found, fallback=found.fallback or f"rounded by GPTQ: {why}")
        return Rounded(nearest(weight, scheme, params), fallback=f"rounded to nearest: {why}")

    def reconstruct(
        self, block: BlockView, calls: list[Call], targets: list[Tensor], params: dict[str, Params]
    ) -> dict[str, Rounded]:
        """See `BlockRounding`. Raises ValueError for a block without layers, `Diverged` (a FloatingPointError) where the loss stops being
        finite; it holds the best codes until then."""
        if not params:
            raise ValueError(f"{block.name}: has no layer to reconstruct")
        work = _Work(self, block, calls, targets, params)
        try:
            kept = work.learn()
        finally:
            models.empty(work.runner)
        found: dict[str, Rounded] = {}
        for name, (codes, grid) in kept.states.items():
            facts = {
                "block_loss": kept.loss,
                "block_loss_nearest": work.loss_nearest,
                "block_loss_start": work.loss_start,
                "step": kept.step,
                **movement(codes, grid, work.nearest[name], params[name]),
            }
            tensor = QTensor.from_codes(codes, grid, work.schemes[name], tuple(codes.shape))
            found[name] = Rounded(tensor, loss=kept.loss, facts=facts)
        return found


class _Work:
    """One block's reconstruction: a float copy in the compute type, its soft weights, its cached inputs and targets."""

    def __init__(
        self, part: Reconstruct, block: BlockView, calls: list[Call], targets: list[Tensor], params: dict[str, Params]
    ) -> None:
        self.part, self.block, self.calls, self.targets = part, block, calls, targets
        self.layers: dict[str, Layer] = {name: block.structure.layer(name) for name in params}
        self.schemes: dict[str, Scheme] = {}
        self.runner: nn.Module = copy.deepcopy(block.module).to(block.compute).requires_grad_(False)
        self.generator = torch.Generator().manual_seed((block.seed * 1_000_003 + block.index) % 2**63)
        self.softs: dict[str, SoftRounding] = {}
        self.nearest: dict[str, Tensor] = {}
        first: dict[str, State] = {}
        for name, grid in params.items():
            layer, scheme = self.layers[name], block.schemes[name]
            assert isinstance(scheme, Scheme)  # `refuses` saw to it
            self.schemes[name] = scheme
            weight = layer.flat(block.module)
            self.nearest[name] = scheme.encode(weight, grid)
            statistics = block.statistics.get(name)
            has = part.start == "gptq" and statistics is not None and statistics.has_hessian and statistics.tokens > 0
            base = started(weight, scheme, grid, statistics.hessian if has and statistics is not None else None)
            first[name] = (self.nearest[name] if base is weight else scheme.encode(base, grid), grid)
            kernel = math.prod(layer.shape[2:]) if layer.kind == "conv" else 1
            with torch.enable_grad():
                self.softs[name] = part.soft.start(base, scheme, grid, kernel=kernel)
        self.weights = sum(codes.numel() for codes in self.nearest.values())
        self.whole = not self._rows_are_independent()
        self.judged = self._judged_pieces()
        self.loss_start = self.judge(first)
        self.loss_nearest = self.loss_start
        if part.start != "nearest":
            self.loss_nearest = self.judge({name: (codes, params[name]) for name, codes in self.nearest.items()})
        self.kept = Kept(first, self.loss_start)
        if not math.isfinite(self.loss_start):
            raise Diverged(block.name, 0, self.kept)

    # -- the loop ---------------------------------------------------------------------------------------------------

    def learn(self) -> Kept:
        """Descend from the start; the best codes that were judged (or, without ``keep_best``, the last)."""
        part, kept = self.part, self.kept
        if self.loss_start == 0:
            return kept
        descent = Descent([p for soft in self.softs.values() for p in soft.parameters()], part.lr, part.steps)
        every = max(1, math.ceil(part.steps / LOOKS))
        batches = self._batches()
        for step in range(1, part.steps + 1):
            loss = self._step(next(batches), descent)
            if not math.isfinite(loss):
                raise Diverged(self.block.name, step, kept)
            if step % every == 0 or step == part.steps:
                with torch.no_grad():
                    states = {name: soft.finish() for name, soft in self.softs.items()}
                    judged = self.judge(states)
                kept.offer(states, judged, step, always=not part.keep_best)
                self.block.say(f"step {step}/{part.steps}, loss {judged / self.loss_start:.3f} of the start's")
        return kept

    def _step(self, pieces: list[tuple[int, Tensor | None]], descent: Descent) -> float:
        """One step of Adam on a mini-batch; its loss before the step, over the start's."""
        with torch.enable_grad():
            swapped = {}
            for name, soft in self.softs.items():
                layer = self.layers[name]
                swapped[layer.parameter] = as_stored(soft.weight(self.block.compute), layer.shape, swapped=layer.swapped)
            sums, rows = [], 0
            for index, chosen in pieces:
                call, target = self._piece(index, chosen)
                with cheap_attention():
                    out = hidden(functional_call(self.runner, swapped, call.args, call.kwargs))
                sums.append(_squares(out, target, call.mask) / out.shape[-1])
                rows += call.rows
            loss = torch.stack(sums).sum() / (rows * self.loss_start)
            objective = loss * self.weights
            for soft in self.softs.values():
                extra = soft.regulariser(descent.progress)
                objective = objective if extra is None else objective + extra
            objective.backward()  # type: ignore[no-untyped-call]
            total = float(loss.detach())
        descent.step()
        return total

    # -- data -------------------------------------------------------------------------------------------------------

    def _piece(self, index: int, chosen: Tensor | None) -> tuple[Call, Tensor]:
        call, target = self.calls[index], self.targets[index]
        return (call, target) if chosen is None else (call.take(chosen), target[chosen])

    def _batches(self) -> Iterator[list[tuple[int, Tensor | None]]]:
        """Mini-batches without end: an epoch cuts each call's rows, shuffled, into runs of ``batch``, and shuffles the runs; calls with fewer
        rows are joined. Rows of one call share their masks and tables, so they run together."""
        while True:
            runs: list[tuple[int, Tensor | None]] = []
            for index, call in enumerate(self.calls):
                if self.whole:
                    runs.append((index, None))
                    continue
                order = torch.randperm(call.rows, generator=self.generator)
                runs += [(index, part) for part in torch.split(order, self.part.batch)]
            batch: list[tuple[int, Tensor | None]] = []
            rows = 0
            for k in torch.randperm(len(runs), generator=self.generator).tolist():
                index, chosen = runs[k]
                count = self.calls[index].rows if chosen is None else len(chosen)
                if batch and rows + count > self.part.batch:
                    yield batch
                    batch, rows = [], 0
                batch, rows = [*batch, runs[k]], rows + count
            yield batch

    def _judged_pieces(self) -> list[tuple[int, Tensor | None]]:
        """At most ``judged`` rows, evenly from all calls (whole calls where rows cannot be taken apart)."""
        if self.whole:
            step = max(1, math.ceil(len(self.calls) / self.part.judged))
            return [(i, None) for i in range(0, len(self.calls), step)]
        rows = [(i, r) for i, call in enumerate(self.calls) for r in range(call.rows)]
        step = max(1, math.ceil(len(rows) / self.part.judged))
        chosen: dict[int, list[int]] = {}
        for i, r in rows[::step]:
            chosen.setdefault(i, []).append(r)
        return [(i, None if len(taken) == self.calls[i].rows else torch.tensor(taken)) for i, taken in chosen.items()]

    def _rows_are_independent(self) -> bool:
        """Whether a row alone gives what it gives among others, as in every model of sequences or images; where rows are packed into one
        (tokens of several images, say), mini-batches are whole calls."""
        call = max(self.calls, key=lambda one: one.rows)
        if call.rows == 1 or call.input.dim() < 2:
            return False
        try:
            together, alone = run(self.runner, [call])[0], run(self.runner, [call.take(torch.tensor([call.rows - 1]))])[0]
        except (RuntimeError, ValueError, IndexError, TypeError):  # whatever a block says of arguments that no longer fit each other
            return False
        if together.shape[0] != call.rows or alone.shape[0] != 1:
            return False
        last = together[-1:].float()
        return float((alone.float() - last).norm()) <= SAME * float(last.norm())

    # -- judging ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def judge(self, states: dict[str, State]) -> float:
        """``L`` of stored codes over the judged rows."""
        for name, (codes, grid) in states.items():
            layer = self.layers[name]
            decoded = self.schemes[name].decode(codes, grid)
            layer.write(self.runner, decoded.reshape(layer.matrix(self.runner).shape))
        total, count = 0.0, 0
        for index, chosen in self.judged:
            call, target = self._piece(index, chosen)
            out = run(self.runner, [call])[0]
            total += float(_squares(out, target, call.mask)) / out.shape[-1]
            count += call.rows
        return total / max(count, 1)


def _squares(out: Tensor, target: Tensor, mask: Tensor | None) -> Tensor:
    """``sum (out - target)^2`` in float32 over the tokens that ``mask [B, T]`` keeps."""
    difference = out.float() - target.float()
    if mask is not None and difference.shape[: mask.dim()] == mask.shape:
        difference = difference[mask]
    return difference.square().sum()
