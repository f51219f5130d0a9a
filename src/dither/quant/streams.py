"""The calibration data on its way through the model: one stream as the float model sees it, one as the rounded model does."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dither.quant.parts import BlockView
from dither.quant.statistics import Statistics, layer_input
from dither.quant.walker import Call, run, run_paused

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
    groups: Sequence[Sequence[str]],
    needs: frozenset[str],
    captured: Sequence[str],
    capture_tokens: int,
) -> list[Tensor]:
    """Run the float block over its stream; fill ``view.statistics`` and ``view.search_calls``. Returns the block's outputs.

    ``captured`` names the submodules whose arguments are kept, for the first ``capture_tokens`` tokens.
    """
    handles = []
    current: list[Call] = []
    for names in groups:
        module = runner.get_submodule(names[0])
        shared: list[Statistics] = []

        def gather(
            module: nn.Module, args: tuple[Any, ...], names: Sequence[str] = names, shared: list[Statistics] = shared
        ) -> None:
            rows = layer_input(module, args[0], current[0].mask)
            if not shared:
                shared.append(Statistics(rows.shape[-1], needs))
                view.statistics.update(dict.fromkeys(names, shared[0]))
            with named(f"{view.name}.{names[0]}"):
                shared[0].update(rows)

        handles.append(module.register_forward_pre_hook(gather))
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
    try:
        for call in calls:
            current[:] = [call]
            outputs += run(runner, [call])
    finally:
        for handle in handles:
            handle.remove()
    for names in groups:
        if names[0] in view.statistics:
            with named(f"{view.name}.{names[0]}"):
                view.statistics[names[0]].check()
    return outputs


def rounded_pass(
    name: str,
    runner: nn.Module,
    calls: list[Call],
    groups: Sequence[Sequence[str]],
    needs: frozenset[str],
    on_group: Callable[[Sequence[str], Statistics], None],
) -> list[Tensor]:
    """Run the block over the rounded stream, pausing at each group of layers; ``on_group(names, statistics)`` rounds them."""
    modules = [[runner.get_submodule(n) for n in names] for names in groups]
    statistics: dict[int, Statistics] = {}

    def on_input(g: int, module: nn.Module, x: Tensor, mask: Tensor | None) -> None:
        rows = layer_input(module, x, mask)
        if g not in statistics:
            statistics[g] = Statistics(rows.shape[-1], needs)
        with named(f"{name}.{groups[g][0]}"):
            statistics[g].update(rows)

    def on_ready(g: int) -> None:
        with named(f"{name}.{groups[g][0]}"):
            statistics[g].check()
        on_group(groups[g], statistics.pop(g))

    return run_paused(runner, calls, modules, on_input, on_ready)


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
