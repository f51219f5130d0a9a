"""Walks calibration data through a model block by block.

Each batch runs through a block as a coroutine (a greenlet), which pauses when it is about to enter a layer that is not yet rounded.
When every batch waits, the group of layers that comes first in call order has seen all of its inputs: its statistics are
complete, it is rounded, and the batches that waited for it go on *through the rounded layer*. So each layer sees exactly
the inputs that the finished model will give it (GPTQ's "true sequential"), for one forward pass a block instead of one a group.

Memory: the live activations of every batch at its pause, T x (the widest tensors alive there) x bytes of the compute type.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from greenlet import getcurrent, greenlet
from torch import Tensor, nn

from dither.quant.attention import cheap_attention


@dataclass
class Call:
    """The arguments of one call of a block, and which tokens of it are real (``mask [B, T]`` bool, None = all)."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    mask: Tensor | None = None

    def with_input(self, x: Tensor) -> Call:
        """The same call with its hidden states replaced."""
        if x is self.input:
            return self
        place = self._place
        if isinstance(place, int):
            return Call((*self.args[:place], x, *self.args[place + 1 :]), self.kwargs, self.mask)
        return Call(self.args, {**self.kwargs, place: x}, self.mask)

    @property
    def input(self) -> Tensor:
        """The hidden states: the first floating tensor among the arguments; where there is none, the first tensor (token ids)."""
        place = self._place
        value = self.args[place] if isinstance(place, int) else self.kwargs[place]
        assert isinstance(value, Tensor)
        return value

    @property
    def _place(self) -> int | str:
        given: list[tuple[int | str, Any]] = [*enumerate(self.args), *self.kwargs.items()]
        tensors = [(k, v) for k, v in given if isinstance(v, Tensor)]
        if not tensors:
            raise TypeError("a block was called without any tensor")
        return next((k for k, v in tensors if v.is_floating_point()), tensors[0][0])

    def head(self, tokens: int) -> Call:
        """The same call on its first rows (sequences, images) that hold at least ``tokens`` tokens: every tensor whose first dimension is
        the input's is cut alike; masks and tables that all rows share stay."""
        keep = max(1, -(-tokens * self.rows // max(self.tokens, 1)))
        return self if keep >= self.rows else self.take(slice(0, keep))

    @property
    def rows(self) -> int:
        """How many sequences (images) it holds."""
        x = self.input
        return x.shape[0] if x.dim() > 1 else 1

    def take(self, chosen: slice | Tensor) -> Call:
        """The same call on some of its rows: every tensor whose first dimension is the input's is cut alike; masks and tables that all rows
        share stay."""
        rows = self.rows

        def cut(value: Any) -> Any:
            if isinstance(value, Tensor):
                return value[chosen] if value.dim() and value.shape[0] == rows else value
            if isinstance(value, tuple | list) and not hasattr(value, "_fields"):
                return type(value)(cut(v) for v in value)
            return value

        mask = None if self.mask is None else self.mask[chosen]
        return Call(tuple(cut(v) for v in self.args), {k: cut(v) for k, v in self.kwargs.items()}, mask)

    @property
    def tokens(self) -> int:
        """How many vectors (or ids) the input holds."""
        x = self.input
        return x.shape[:-1].numel() if x.is_floating_point() else x.numel()


def hidden(output: Any) -> Tensor:
    """The hidden states in what a block returned: the tensor itself, or the first of a tuple or of a model output."""
    if isinstance(output, Tensor):
        return output
    first = output[0]
    if not isinstance(first, Tensor):
        raise TypeError(f"a block returned {type(output).__name__} whose first item is no tensor")
    return first


class _Stop(Exception):
    """Raised to leave a model's forward once the last block was called."""


@contextmanager
def _forwards(modules: Sequence[nn.Module], functions: Sequence[Callable[..., Any]]) -> Iterator[None]:
    """Replace the ``forward`` of some modules; their attributes stay visible to the model around them."""
    for module, function in zip(modules, functions, strict=True):
        module.__dict__["forward"] = function
    try:
        yield
    finally:
        for module in modules:
            module.__dict__.pop("forward", None)


def capture_calls(
    model: nn.Module,
    blocks: Sequence[nn.Module],
    batches: Sequence[dict[str, Tensor]],
    first_block: Callable[[], nn.Module] | None = None,
) -> list[list[Call]]:
    """The call of every block by every batch, ``[block][batch]``, without running the blocks.

    The model runs with each block replaced by one that hands its hidden states on unchanged; masks, positions and
    rotary tables do not depend on them. Only ``[0][batch]`` holds true hidden states, the other calls hold those of block 0
    and wait for `Call.with_input`. ``first_block()`` returns block 0 with real weights, to learn what a block returns.
    """
    calls: list[list[Call]] = [[] for _ in blocks]
    template: Any = None
    for n, batch in enumerate(batches):
        mask = batch.get("attention_mask")
        mask = mask.bool() if mask is not None and mask.dim() == 2 and not bool(mask.all()) else None
        if n == 0 and first_block is not None:
            template = _block_output(model, blocks[0], batch, first_block)

        def recorder(i: int, mask: Tensor | None = mask, template: Any = template) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                call = Call(args, kwargs, mask)
                calls[i].append(call)
                if i == len(blocks) - 1:
                    raise _Stop
                return (call.input, *template[1:]) if isinstance(template, tuple) else call.input

            return forward

        with _forwards(blocks, [recorder(i) for i in range(len(blocks))]), suppress(_Stop):
            model(**batch)
    return calls


def _block_output(model: nn.Module, block: nn.Module, batch: dict[str, Tensor], load: Callable[[], nn.Module]) -> Any:
    seen: list[Call] = []

    def forward(*args: Any, **kwargs: Any) -> Any:
        seen.append(Call(args, kwargs))
        raise _Stop

    with _forwards([block], [forward]), suppress(_Stop):
        model(**batch)
    if not seen:
        return None
    return load()(*seen[0].args, **seen[0].kwargs)


def run(block: nn.Module, calls: Sequence[Call]) -> list[Tensor]:
    """The block's hidden states for each call."""
    with cheap_attention():
        return [hidden(block(*call.args, **call.kwargs)) for call in calls]


def mask_at_work() -> Tensor | None:
    """Which tokens are real in the call that `run_paused` is running just now; None: all."""
    call: Call | None = getattr(getcurrent(), "call", None)
    return None if call is None else call.mask


def run_paused(
    block: nn.Module,
    calls: Sequence[Call],
    groups: Sequence[Sequence[nn.Module]],
    on_input: Callable[[int, nn.Module, Tensor, Tensor | None], None],
    on_ready: Callable[[int], None],
) -> list[Tensor]:
    """Run every call through the block, pausing in front of each group of layers until all inputs of the group are seen.

    ``groups[g]`` are modules that read one tensor, in call order; they need not lie in the block (`experts.opened`).
    ``on_input(g, module, x, mask)`` is called with each batch's input of the group, ``on_ready(g)`` once the group has them all: there the
    caller changes the layers' weights. A batch that reaches a group after it was closed (a branch not taken by the others) runs through it
    without being counted.
    """
    done: set[int] = set()
    handles = []

    def hook(g: int) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def pause(module: nn.Module, args: tuple[Any, ...]) -> None:
            current = getcurrent()
            if g in done or current.parent is None:
                return
            on_input(g, module, args[0], current.call.mask)
            current.parent.switch(g)

        return pause

    for g, members in enumerate(groups):
        handles += [module.register_forward_pre_hook(hook(g)) for module in members]
    try:
        outputs: list[Tensor | None] = [None] * len(calls)
        routines: list[greenlet] = []
        waiting: dict[int, int] = {}

        def step(k: int) -> None:
            result = routines[k].switch()
            if routines[k].dead:
                outputs[k] = result
                waiting.pop(k, None)
            else:
                waiting[k] = result

        with cheap_attention():
            for k, call in enumerate(calls):
                routine = greenlet(lambda call=call: hidden(block(*call.args, **call.kwargs)))
                routine.call = call
                routines.append(routine)
                step(k)
            while waiting:
                g = min(waiting.values())
                on_ready(g)
                done.add(g)
                for k in [k for k, at in waiting.items() if at == g]:
                    step(k)
        return [o for o in outputs if o is not None]
    finally:
        for handle in handles:
            handle.remove()
