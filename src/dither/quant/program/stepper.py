"""One sequence, read and stepped by a program where the model has one."""

from __future__ import annotations

from torch import Tensor, nn

from dither.quant.program.program import KeysValues, Program
from dither.quant.program.proof import is_plain, program_for
from dither.quant.stepping import Stepper

_WORTH = 16  # tokens to be made
_LONG = 256  # tokens of a prompt, which then waits for the program
_VERY_LONG = 512  # which is worth a program by itself, as more may follow


class ProgramStepper(Stepper):
    """A `Stepper` that steps by a program, where the model has one. ``tokens``: how many will be made; a program is worth its making from some
    `_WORTH` on. The model reads a short prompt itself, before its program is made."""

    def __init__(self, model: nn.Module, ids: Tensor, tokens: int) -> None:
        super().__init__(model, ids)
        self.tokens, self.token = tokens, 0
        self.program: Program | None = None
        self.held: KeysValues | None = None

    def logits(self) -> Tensor:
        if self.program is not None and self.held is not None:
            return self.program.step(self.token, self.held)
        worth, prompt = self.tokens >= _WORTH, self.cached and self.cache is None
        long = prompt and self.length >= (_LONG if worth else _VERY_LONG)
        if long and (program := program_for(self.model)) is not None and program.reads_prompts:
            self.program, self.held = program, program.start(self.length + self.tokens)
            return program.read(self.ids[0].tolist(), self.held)
        row = super().logits()
        if worth and self.cached and is_plain(self.cache) and (program := program_for(self.model)) is not None:
            self.program, self.held, self.cache = program, KeysValues.of(self.cache), None
        return row

    def append(self, token: int) -> None:
        self.token = token
        super().append(token)
