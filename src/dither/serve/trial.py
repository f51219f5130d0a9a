"""Which way of stepping a model is exact: found by running it, not by its name.

A model that has a program is stepped by it, whose rows are by construction what each is alone (`kernels.tape`). Of others, a step is watched
first for functions whose rounding depends on where a row lies (`alignment`). Then scores are compared: a row at a time against the model's own loop,
and rows side by side against rows alone, bit by bit: random prompts of several lengths, every number of rows, other orders, and beside a row that
claims to be at the model's last position. What differs is not used.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dither.errors import ModelError
from dither.quant.cpu_products import FEW_ROWS
from dither.quant.program.proof import program_for
from dither.quant.stepping import positions
from dither.serve.alignment import Watch
from dither.serve.batch import Batch, ByProgram, OneByOne, SideBySide
from dither.serve.fixed_rows import fix_rows

_LENGTHS = (1, 2, 3, 5, 8, 9, 12, 4)  # of prompts; with one more token none is _WATCHED
_WATCHED = 7  # rows of the step that is watched: a number that few other dimensions have
_UNFIT = (ModelError, RuntimeError, ValueError, TypeError, AttributeError, LookupError, AssertionError)  # how a model may refuse such a call


def stepper(model: nn.Module) -> Batch[Any]:
    """The quickest way that is exact. Costs some prompts and steps of the model."""
    program = program_for(model)
    return ByProgram(model, program) if program is not None else of_the_model(model)


def of_the_model(model: nn.Module) -> Batch[Any]:
    """The quickest way of stepping the model itself that is exact."""
    handles = fix_rows(model)
    try:
        with torch.inference_mode():
            return _side_by_side(model)
    except _UNFIT as error:
        for handle in handles:
            handle.remove()
        return OneByOne(model, " ".join(str(error).split()))


def _side_by_side(model: nn.Module) -> SideBySide:
    """Raises ModelError where it would not be exact."""
    batch = SideBySide(model, fill=False)
    trial = _Trial(batch)
    with Watch(_WATCHED) as watch:
        trial.rows(range(_WATCHED))
    why = "its widths are no multiples of vectors"
    for batch.fill, counts in ((False, range(1, FEW_ROWS + 1)), (True, [FEW_ROWS])):
        if watch.safe(counts):
            trial.compare_with_the_model()
            why = trial.difference()
            if not why:
                return batch
    raise ModelError(why)


class _Trial:
    """Some sequences, and what a step of each alone gives."""

    def __init__(self, batch: SideBySide) -> None:
        self.batch = batch
        vocabulary = batch.model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
        limit, draw = positions(batch.model) or 64, torch.Generator().manual_seed(0)
        self.prompts = [torch.randint(vocabulary, (max(1, min(n, limit - 2)),), generator=draw).tolist() for n in _LENGTHS]
        self.tokens = torch.randint(vocabulary, (FEW_ROWS,), generator=draw).tolist()
        self.starts = [batch.read(prompt)[0] for prompt in self.prompts]
        self.places = [s.length for s in self.starts]
        self.last = limit - 1

    def rows(self, order: Sequence[int]) -> list[Tensor]:
        """Scores of these sequences side by side."""
        chosen = [self.starts[i].copy() for i in order]
        return self.batch.step_at(chosen, [self.tokens[i] for i in order], [self.places[i] for i in order])

    def compare_with_the_model(self) -> None:
        """Raises ModelError where a row is not what the model's own loop gives, whose masks and shapes may round otherwise."""
        narrow = next(self.batch.model.parameters()).dtype in (torch.bfloat16, torch.float16)
        for i, (start, token) in enumerate(zip(self.starts, self.tokens, strict=True)):
            (found,), alone = self.rows([i]), start.copy()
            alone.append(token)
            expected = alone.logits()
            if float((found - expected).abs().max()) > (5e-2 if narrow else 1e-3) * float(expected.abs().max()):
                raise ModelError("a row at a time, its scores are not those of the sequence")

    def difference(self) -> str:
        """What differs, in words; nothing where all is the same."""
        before, self.places[-1] = self.places[-1], self.last  # a long sequence must not change what short ones see
        alone = [self.rows([i])[0] for i in range(FEW_ROWS)]
        try:
            for count in range(2, FEW_ROWS + 1):
                some = list(range(FEW_ROWS))[-count:]
                for order in (some, some[::-1], some[1::2] + some[::2]):
                    for i, found in zip(order, self.rows(order), strict=True):
                        if not torch.equal(alone[i], found):
                            return f"{count} rows side by side differ from each alone by {float((alone[i] - found).abs().max()):.1e}"
        finally:
            self.places[-1] = before
        return ""
