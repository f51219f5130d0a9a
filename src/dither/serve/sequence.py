"""One text in the making: from the scores of the next token to a piece of text with its log-probabilities, and when to stop."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from dither.quant.sampling import Chooser, Sampling
from dither.quant.text_stream import TextStream


@dataclass(frozen=True)
class Score:
    """A chosen token's natural log-probability under the model (before temperature, top-k and top-p), and the likeliest tokens beside it."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Piece:
    """What a step added to choice ``index``: text, ``tokens`` new tokens, their scores where they were asked for, and at the end why it ended:
    "stop" (end token or stop string) or "length"."""

    index: int
    text: str
    tokens: int
    scores: tuple[Score, ...] = ()
    finish: str | None = None


@dataclass(eq=False)
class Sequence:
    """``prompt``: token ids. ``top``: how many of the likeliest tokens to score beside the chosen one; None: no scores. ``ends``: tokens that end
    the text. ``state``: what the model keeps of it, from when it is read on."""

    index: int
    prompt: tuple[int, ...]
    sampling: Sampling
    tokenizer: Any
    ends: frozenset[int] = frozenset()
    top: int | None = None
    state: Any = None
    made: int = 0
    _unsaid: list[Score] = field(default_factory=list)  # scores of tokens whose text is held back
    _untold: int = 0  # tokens of no piece yet

    def __post_init__(self) -> None:
        self.chooser = Chooser(self.sampling)
        self.stream = TextStream(self.tokenizer, self.prompt, self.sampling.stop)

    def take(self, logits: Tensor) -> tuple[int, Piece | None]:
        """The next token, chosen from ``logits [V]``, and what there is to say about it. Raises ValueError where they are not finite."""
        token = self.chooser.choose(logits)
        if token in self.ends:
            return token, self._piece(self.stream.rest(), "stop")
        self.made += 1
        self._untold += 1
        if self.top is not None:
            self._unsaid.append(score(logits, token, self.top))
        text = self.stream.push(token)
        if self.stream.stopped:
            return token, self._piece(text, "stop")
        if self.made >= self.sampling.max_tokens:
            return token, self._piece(text + self.stream.rest(), "length")
        return token, self._piece(text, None) if text else None

    def _piece(self, text: str, finish: str | None) -> Piece:
        piece = Piece(self.index, text, self._untold, tuple(self._unsaid), finish)
        self._unsaid, self._untold = [], 0
        return piece


def score(logits: Tensor, token: int, top: int) -> Score:
    """``logits [V]``; ``top``: likeliest tokens to name."""
    logs = logits.log_softmax(-1)
    best = logs.topk(min(top, logs.shape[0]))
    return Score(token, float(logs[token]), tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True)))


