"""One sequence, stepped by a program where the model has one."""

from __future__ import annotations

from torch import Tensor, nn

from dither.quant.program.program import KeysValues, Program
from dither.quant.program.proof import is_plain, program_for
from dither.quant.stepping import Stepper

_WORTH = 16  # tokens


class ProgramStepper(Stepper):
    """A `Stepper` that steps by a program, where the model has one; the prompt is read by the model. ``tokens``: how many will be made; a program is
    worth its making from some `_WORTH` on."""

    def __init__(self, model: nn.Module, ids: Tensor, tokens: int) -> None:
        super().__init__(model, ids)
        self.tokens, self.token = tokens, 0
        self.program: Program | None = None
        self.held: KeysValues | None = None

    def logits(self) -> Tensor:
        if self.program is not None and self.held is not None:
            return self.program.step(self.token, self.held)
        row = super().logits()
        if self.tokens >= _WORTH and self.cached and is_plain(self.cache) and (program := program_for(self.model)) is not None:
            self.program, self.held, self.cache = program, KeysValues(self.cache), None
        return row

    def append(self, token: int) -> None:
        self.token = token
        super().append(token)
