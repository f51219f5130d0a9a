"""Tokens to text as they come: whole characters, the space in front of the first word, and stop strings that are never shown.

Tokens are decoded behind a few tokens before them, whose text is cut off again: decoded alone, the first token loses its leading space in some
tokenizers. After `_SEGMENT` tokens the last ones become the new context, so a token costs the same however long the text is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_CONTEXT = 5  # tokens that are decoded along
_SEGMENT = 16  # tokens, at the least, that are decoded again and again
_BROKEN = "�"  # what a tokenizer shows for half a character


class TextStream:
    """``prompt``: the token ids in front. ``text`` is all that the tokens say, up to the first of the ``stop`` strings; ``stopped``: whether one
    came."""

    def __init__(self, tokenizer: Any, prompt: Sequence[int], stop: tuple[str, ...] = ()) -> None:
        self.tokenizer, self.stop = tokenizer, stop
        self.text, self.stopped = "", False
        self._shown = 0  # characters handed out
        self._closed = ""  # text of the tokens that are not decoded again
        self._open(prompt[-_CONTEXT:])

    def push(self, token: int) -> str:
        """The text that has become certain by one more token; mostly the token's own."""
        self._segment.append(token)
        own = self._decode([*self._context, *self._segment])[self._before :]
        self.text = self._closed + own
        whole = not own.endswith(_BROKEN)
        if whole and len(self._segment) >= _SEGMENT:
            self._closed = self.text
            self._open([*self._context, *self._segment][-_CONTEXT:])
        found = [at for s in self.stop if (at := self.text.find(s, self._shown)) >= 0]  # what was shown begins none
        if found:
            self.text, self.stopped = self.text[: min(found)], True
            return self.rest()
        return self._show(len(self.text) - self._may_yet_stop()) if whole else ""

    def rest(self) -> str:
        """What was held back: no more tokens will come."""
        return self._show(len(self.text))

    def _open(self, context: Sequence[int]) -> None:
        self._context, self._segment = list(context), list[int]()
        self._before = len(self._decode(self._context))

    def _decode(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))

    def _show(self, end: int) -> str:
        piece = self.text[self._shown : end]
        self._shown = max(self._shown, end)
        return piece

    def _may_yet_stop(self) -> int:
        """Characters at the end that may be the beginning of a stop string."""
        return max((n for s in self.stop for n in range(1, len(s)) if self.text.endswith(s[:n])), default=0)
