"""How pieces of text are written down: as completions or as chat completions, whole or in chunks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from dither.serve import schemas as s
from dither.serve.sequence import Piece, Score
from dither.serve.token_text import TokenText


class Form(ABC):
    """``top``: likeliest tokens to name beside each; None: no log-probabilities."""

    prefix: str
    whole: str  # what `object` is called
    chunk: str

    def __init__(self, tokens: TokenText, top: int | None) -> None:
        self.tokens, self.top = tokens, top
        self._begun: set[int] = set()
        self._offset: dict[int, int] = {}  # characters of each choice's tokens so far

    @abstractmethod
    def choice(self, index: int, text: str, scores: tuple[Score, ...], finish: str | None) -> Any:
        """Of a whole answer."""

    @abstractmethod
    def part(self, piece: Piece) -> list[Any]:
        """The choices of the chunks that tell of ``piece``, a chunk each."""


class CompletionForm(Form):
    prefix, whole, chunk = "cmpl-", "text_completion", "text_completion"

    def choice(self, index: int, text: str, scores: tuple[Score, ...], finish: str | None) -> s.CompletionChoice:
        return s.CompletionChoice(index=index, text=text, logprobs=self._logprobs(index, scores), finish_reason=finish)

    def part(self, piece: Piece) -> list[s.CompletionChoice]:
        return [self.choice(piece.index, piece.text, piece.scores, piece.finish)]

    def _logprobs(self, index: int, scores: tuple[Score, ...]) -> s.CompletionLogprobs | None:
        if self.top is None:
            return None
        texts, offsets = [self.tokens.text(score.token) for score in scores], []
        for text in texts:
            offsets.append(self._offset.get(index, 0))
            self._offset[index] = offsets[-1] + len(text)
        tops = [{self.tokens.text(t): p for t, p in (*score.top, (score.token, score.logprob))} for score in scores] if self.top else None
        return s.CompletionLogprobs(tokens=texts, token_logprobs=[score.logprob for score in scores], top_logprobs=tops, text_offset=offsets)


class ChatForm(Form):
    prefix, whole, chunk = "chatcmpl-", "chat.completion", "chat.completion.chunk"

    def choice(self, index: int, text: str, scores: tuple[Score, ...], finish: str | None) -> s.ChatChoice:
        message = {"role": "assistant", "content": text, "refusal": None}
        return s.ChatChoice(index=index, message=message, logprobs=self._logprobs(scores), finish_reason=finish)

    def part(self, piece: Piece) -> list[s.ChatChunkChoice]:
        """The first chunk of a choice says who speaks, the last why it ends."""
        found: list[tuple[dict[str, str], s.ChatLogprobs | None, str | None]] = []
        if piece.index not in self._begun:
            self._begun.add(piece.index)
            found.append(({"role": "assistant", "content": ""}, None, None))
        if piece.text or piece.scores:
            found.append(({"content": piece.text}, self._logprobs(piece.scores), None))
        if piece.finish is not None:
            found.append(({}, None, piece.finish))
        return [s.ChatChunkChoice(index=piece.index, delta=d, logprobs=logs, finish_reason=finish) for d, logs, finish in found]

    def _logprobs(self, scores: tuple[Score, ...]) -> s.ChatLogprobs | None:
        if self.top is None:
            return None
        return s.ChatLogprobs(content=[
            s.TokenLogprob(**self._one(score.token, score.logprob), top_logprobs=[s.TopLogprob(**self._one(t, p)) for t, p in score.top[: self.top]])
            for score in scores
        ])  # fmt: skip

    def _one(self, token: int, logprob: float) -> dict[str, Any]:
        return {"token": self.tokens.text(token), "logprob": logprob, "bytes": self.tokens.bytes(token)}
