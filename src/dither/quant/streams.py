"""The calibration data on its way through the model: one stream as the float model sees it, one as the rounded model does."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dither.graph import Layer
from dither.quant.experts import opened
from dither.quant.parts import BlockView
from dither.quant.slices import Place, rows_kept
from dither.quant.statistics import Statistics, slice_inputs
from dither.quant.walker import Call, mask_at_work, run, run_paused

SEARCH_PIECE = 512  # tokens kept of one batch, at least one row (a sequence, an image)


class Streams:
    """Hidden states of every batch in front of the next block, and each block's other arguments.

    ``calls[block][batch]`` come from `walker.capture_calls`. Memory: T x hidden size x bytes of the compute type, for each of the (at most
    two) streams in use; they share one tensor until a block is changed.
    """

    def __init__(self, calls: list[list[Call]], *, use_float: bool, use_rounded: bool) -> None:
        self._calls = calls
        first = [call.input for call in calls[0]] if calls else []
        self.float: list[Tensor] | None = list(first) if use_float else None
        self.rounded: list[Tensor] | None = list(first) if use_rounded else None

    def calls(self, block: int, hidden: Sequence[Tensor] | None) -> list[Call]:
        if hidden is None:
            return []
        return [call.with_input(x) for call, x in zip(self._calls[block], hidden, strict=True)]

    def done(self, block: int) -> None:
        """Forget a block's arguments."""
        if self._calls:
            self._calls[block] = []


def float_pass(
    view: BlockView,
    runner: nn.Module,
    calls: list[Call],
    places: Sequence[Place],
    needs: frozenset[str],
    captured: Sequence[str],
    capture_tokens: int,
) -> list[Tensor]:
    """Run the float block over its stream; fill ``view.statistics``, ``view.slices`` and ``view.search_calls``. Returns the block's outputs.

    ``captured`` names the submodules whose arguments are kept, for the first ``capture_tokens`` tokens.
    """
    handles = []
    current: list[Call] = []

    def gather(place: Place) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        gathered: list[Statistics] = []

        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            rows = slice_inputs(module, args[0], current[0].mask)
            if not gathered:
                count = len(rows) if place.expert is None else view.structure.layer(place.layers[0]).shape[0]
                gathered.extend(Statistics(x.shape[-1], needs, rows_kept(count)) for x in rows)
                if place.expert is None and len(rows) == 1:
                    view.statistics.update(dict.fromkeys(place.layers, gathered[0]))
                else:
                    for layer in place.layers:
                        view.slices.setdefault(layer, {}).update(enumerate(gathered, place.expert or 0))
            with named(f"{view.name}.{place.layers[0]}"):
                for statistics, x in zip(gathered, rows, strict=True):
                    statistics.update(x)

        return hook

    for name in captured:
        kept = view.search_calls.setdefault(name, [])
        if name == "":
            for call in calls:
                _keep(kept, call, capture_tokens)
            continue

        def keep(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], kept: list[Call] = kept
        ) -> None:
            _keep(kept, Call(args, kwargs, current[0].mask), capture_tokens)

        handles.append(runner.get_submodule(name).register_forward_pre_hook(keep, with_kwargs=True))
    outputs = []
    with opened(runner, _stacks(view, places), lambda: current[0].mask) as experts:
        for place in places:
            handles.append(place.modules(runner, experts)[0].register_forward_pre_hook(gather(place)))
        try:
            for call in calls:
                current[:] = [call]
                outputs += run(runner, [call])
        finally:
            for handle in handles:
                handle.remove()
    every = {name: [statistics] for name, statistics in view.statistics.items()}
    for name, gathered in (every | {name: list(found.values()) for name, found in view.slices.items()}).items():
        with named(f"{view.name}.{name}"):
            for statistics in gathered:
                statistics.check()
    return outputs


def rounded_pass(
    view: BlockView,
    runner: nn.Module,
    calls: list[Call],
    places: Sequence[Place],
    needs: frozenset[str],
    on_place: Callable[[Place, list[Statistics]], None],
) -> list[Tensor]:
    """Run the block over the rounded stream, pausing at each place; ``on_place(place, statistics)`` rounds its layers there, given what each of
    their slices reads (most layers have one)."""
    gathered: dict[int, list[Statistics]] = {}

    def on_input(p: int, module: nn.Module, x: Tensor, mask: Tensor | None) -> None:
        rows = slice_inputs(module, x, mask)
        if p not in gathered:
            gathered[p] = [Statistics(part.shape[-1], needs) for part in rows]
        with named(f"{view.name}.{places[p].layers[0]}"):
            for statistics, part in zip(gathered[p], rows, strict=True):
                statistics.update(part)

    def on_ready(p: int) -> None:
        found = gathered.pop(p)
        with named(f"{view.name}.{places[p].layers[0]}"):
            for statistics in found:
                statistics.check()
        on_place(places[p], found)

    with opened(runner, _stacks(view, places), mask_at_work) as experts:
        modules = [place.modules(runner, experts) for place in places]
        return run_paused(runner, calls, modules, on_input, on_ready)


def _stacks(view: BlockView, places: Sequence[Place]) -> list[Layer]:
    """The stacks of experts whose slices are places."""
    return [view.structure.layer(n) for n in dict.fromkeys(n for place in places if place.expert is not None for n in place.layers)]


@contextmanager
def named(layer: str) -> Iterator[None]:
    """Puts the layer's name in front of what a ValueError says."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{layer.lstrip('.')}: {error}") from None  # a model that is handled whole has no name


def _keep(kept: list[Call], call: Call, tokens: int) -> None:
    """Keep the head of a call, unless enough tokens are kept: a few from each batch see more of the data than all of one."""
    if sum(c.tokens for c in kept) < tokens:
        kept.append(call.head(min(tokens, SEARCH_PIECE)))


def shorten(batch: dict[str, Tensor], tokens: int = 16) -> dict[str, Tensor]:
    """A sample of a batch that is large enough to prove structure with: two rows, of at most ``tokens`` tokens where the
    inputs are token ids (images keep their size)."""
    out = {}
    for name, value in batch.items():
        value = value[:2]
        if value.dim() == 2 and not value.is_floating_point():
            value = value[:, :tokens]
        out[name] = value
    return out


def padding_mask(batch: dict[str, Tensor]) -> Tensor | None:
    """``[B, T]`` bool of the real tokens; None where there is no padding."""
    mask = batch.get("attention_mask")
    if mask is None or mask.dim() != 2 or bool(mask.all()):
        return None
    return mask.to(torch.bool)
