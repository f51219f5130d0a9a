"""What single tokens say, for lists of log-probabilities."""

from __future__ import annotations

from typing import Any

_BROKEN = "�"


class TokenText:
    """``text(token)`` with the leading space that some tokenizers drop from what they decode alone; each token is decoded once."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._known: dict[int, str] = {}
        self._anchor: list[int] = list(tokenizer("a", add_special_tokens=False)["input_ids"])
        self._before = len(self._decode([]))

    def text(self, token: int) -> str:
        if token not in self._known:
            self._known[token] = self._decode([token])[self._before :]
        return self._known[token]

    def bytes(self, token: int) -> list[int] | None:
        """UTF-8 of the text; None for a part of a character."""
        text = self.text(token)
        return None if _BROKEN in text else list(text.encode())

    def _decode(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode([*self._anchor, *ids], skip_special_tokens=False))
