"""The model stepped over several sequences, so that each one's scores are, to the last bit, those it would have alone.

    by program     a row a sequence through the model's recorded step (`quant.program`), on keys and values of its own; rows share the reading of all
                   weights, and nothing else; prompts are read in pieces. For models that have a program
    side by side   input_ids [1, n], a token a sequence, with each one's own position: layers see n rows, few-bit ones read their weights once for
                   all; attention goes row by row (`rows_cache`), float layers see a constant number of rows (`fixed_rows`)
    filled up      the same with n constant: rows without a sequence are filling. For models whose widths are no multiples of a processor's vectors,
                   so that where a row ends up in a vector depends on n
    one by one     a call a sequence: for models whose rows meet (experts that gather tokens, states that are no keys and values)

Which of the four a model gets, `trial` finds.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn

from dither.errors import ModelError
from dither.quant.attention import cheap_attention
from dither.quant.attention_names import attention_configs, attention_named
from dither.quant.cpu_products import FEW_ROWS
from dither.quant.kv import KNOWN, attention_modules
from dither.quant.program.program import PIECE, KeysValues, Program
from dither.quant.program.proof import is_plain
from dither.quant.stepping import Stepper
from dither.serve.rows_cache import NAME, Attention, RowsCache, make_growing

Between = Callable[[], None]


class State(Protocol):
    """What a way of stepping keeps of a sequence."""

    def copy(self) -> State:
        """The same sequence again, to go on in another way."""


S = TypeVar("S", bound=State)


class Batch(ABC, Generic[S]):
    """``rows``: sequences that one call steps at the most. ``why``: of one by one, what stood against side by side."""

    rows = 1
    why = ""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.device = next(model.parameters()).device

    @abstractmethod
    def read(self, prompt: Sequence[int], between: Between = lambda: None) -> tuple[S, Tensor]:
        """A new sequence, and the scores ``[V]`` of its next token. ``between`` is called between pieces, where a prompt is read in such; others may
        be stepped there."""

    @abstractmethod
    def step(self, sequences: Sequence[S], tokens: Sequence[int]) -> list[Tensor]:
        """Append a token to each sequence; the scores ``[V]`` of the next ones. At most ``rows`` sequences."""

    def _read(self, prompt: Sequence[int]) -> tuple[Stepper, Tensor]:
        """By the model itself."""
        sequence = Stepper(self.model, torch.tensor([list(prompt)], device=self.device))
        with cheap_attention():
            return sequence, sequence.logits()


class ByProgram(Batch[KeysValues]):
    """Prompts are read by the program too, each by itself, or by the model where it has dense layers."""

    rows = FEW_ROWS

    def __init__(self, model: nn.Module, program: Program) -> None:
        super().__init__(model)
        self.program = program

    def read(self, prompt: Sequence[int], between: Between = lambda: None) -> tuple[KeysValues, Tensor]:
        if self.program.reads_prompts:
            held = self.program.start(len(prompt))
            for first in range(0, len(prompt), PIECE):
                if first:
                    between()
                logits = self.program.read(prompt[first : first + PIECE], held)
            return held, logits
        sequence, logits = self._read(prompt)
        if not is_plain(sequence.cache):
            raise ModelError("its cache of this prompt is not one of keys and values alone")
        return KeysValues.of(sequence.cache), logits

    def step(self, sequences: Sequence[KeysValues], tokens: Sequence[int]) -> list[Tensor]:
        return self.program.step_rows(tokens, sequences)


class OneByOne(Batch[Stepper]):
    def __init__(self, model: nn.Module, why: str = "") -> None:
        super().__init__(model)
        self.why = why

    def read(self, prompt: Sequence[int], between: Between = lambda: None) -> tuple[Stepper, Tensor]:
        return self._read(prompt)

    def step(self, sequences: Sequence[Stepper], tokens: Sequence[int]) -> list[Tensor]:
        for sequence, token in zip(sequences, tokens, strict=True):
            sequence.append(token)
        return [sequence.logits() for sequence in sequences]


class SideBySide(Batch[Stepper]):
    """``fill``: whether the model always gets `rows` rows. Raises ModelError where the model's attention or its arguments do not allow it; that the
    numbers are right, `trial` finds out."""

    rows = FEW_ROWS

    def __init__(self, model: nn.Module, *, fill: bool) -> None:
        super().__init__(model)
        self.fill = fill
        accepts = inspect.signature(model.forward).parameters
        missing = {"position_ids", "past_key_values"} - set(accepts)
        if missing:
            raise ModelError(f"it takes no {' and no '.join(sorted(missing))}")
        self.inner, self.configs = _attentions(model), attention_configs(model)

    def read(self, prompt: Sequence[int], between: Between = lambda: None) -> tuple[Stepper, Tensor]:
        sequence, logits = self._read(prompt)
        make_growing(sequence.cache)
        return sequence, logits

    def step(self, sequences: Sequence[Stepper], tokens: Sequence[int]) -> list[Tensor]:
        places = [s.length for s in sequences]
        for sequence in sequences:
            sequence.length += 1
        return self.step_at(sequences, tokens, places)

    def step_at(self, sequences: Sequence[Stepper], tokens: Sequence[int], places: Sequence[int]) -> list[Tensor]:
        """``places``: the position of each token in its sequence."""
        cache = RowsCache([s.cache for s in sequences], self.inner)
        filling = [0] * (self.rows - len(tokens) if self.fill else 0)
        ids, position_ids = torch.tensor([[*tokens, *filling], [*places, *filling]], device=self.device)[:, None]
        with attention_named(NAME, self.configs):
            output = self.model(input_ids=ids, position_ids=position_ids, past_key_values=cache, use_cache=True)
        cache.check_read()
        return list(output.logits[0, : len(tokens)].float().cpu().unbind())


def _attentions(model: nn.Module) -> dict[nn.Module, Attention]:
    """What each attention module calls now."""
    try:
        reached = attention_modules(model)
    except ModelError:
        raise ModelError("its attention does not go through transformers' AttentionInterface") from None
    found: dict[nn.Module, Attention] = {}
    for name, (module, interface, eager) in reached.items():
        used = getattr(getattr(module, "config", None), "_attn_implementation", None) or "eager"
        if used.removeprefix("dither-") not in KNOWN:
            raise ModelError(f"{name}: its attention is {used!r}")
        found[module] = eager if used == "eager" else interface.get_interface(used, eager)
    return found
