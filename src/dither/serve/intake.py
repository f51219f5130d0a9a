"""From a request to the sequences that answer it: prompts to tokens, limits, sampling."""

from __future__ import annotations

import secrets
from typing import Any

from dither.errors import UsageError
from dither.quant.prompts import encode, encode_chat, has_chat_template
from dither.quant.sampling import Sampling
from dither.serve.errors import ApiError
from dither.serve.schemas import Ask, ChatAsk, CompletionAsk
from dither.serve.sequence import Sequence


class Intake:
    """``vocabulary``: tokens that the model scores; ``context``: tokens of prompt and text together; ``max_tokens``: new tokens of a text; ``most``:
    texts that the server takes at all. Not for several threads: tokenizers are not made for them."""

    def __init__(self, tokenizer: Any, ends: frozenset[int], vocabulary: int, *, context: int, max_tokens: int, most: int) -> None:
        self.tokenizer, self.ends, self.vocabulary = tokenizer, ends, vocabulary
        self.context, self.max_tokens, self.most = context, max_tokens, most
        self.characters = context * max(map(len, tokenizer.get_vocab()))  # more than fit for certain: not worth cutting into tokens

    def sequences(self, ask: Ask) -> list[Sequence]:
        """``n`` for each prompt. Raises ApiError where the request does not fit the model or the limits."""
        unknown = [token for token in ask.logit_bias if token >= self.vocabulary]
        if unknown:
            raise ApiError(400, f"logit_bias: token {unknown[0]} is none of the model's {self.vocabulary}", param="logit_bias")
        try:
            prompts = self._prompts(ask)
        except ValueError as error:  # UsageError is one
            raise ApiError(400, str(error), param=ask.where) from None
        if len(prompts) * ask.n > self.most:
            raise ApiError(400, f"n: {len(prompts) * ask.n} texts are more than the {self.most} that the server takes at all", param="n")
        seed = secrets.randbits(62) if ask.seed is None else ask.seed
        return [
            Sequence(i * ask.n + k, ids, self._sampling(ask, len(ids), seed + k), self.tokenizer, self.ends, ask.top())
            for i, ids in enumerate(prompts)
            for k in range(ask.n)
        ]

    def _prompts(self, ask: Ask) -> list[tuple[int, ...]]:
        """Raises ValueError for what the tokenizer or the template refuses."""
        longest = max(map(len, ask.texts()), default=0)
        if longest > self.characters:
            raise self._too_long(ask, f"has {longest} characters, which are more than the {self.context} tokens that fit")
        if isinstance(ask, ChatAsk):
            if not has_chat_template(self.tokenizer):
                raise UsageError("the model has no chat template; use /v1/completions")
            return [tuple(encode_chat(self.tokenizer, [message.plain() for message in ask.messages]))]
        assert isinstance(ask, CompletionAsk)
        return [tuple(encode(self.tokenizer, p) if isinstance(p, str) else self._known(p)) for p in ask.prompts()]

    def _known(self, ids: list[int]) -> list[int]:
        if not ids:
            raise ValueError("prompt: is empty")
        if max(ids) >= self.vocabulary:
            raise ValueError(f"prompt: token {max(ids)} is none of the model's {self.vocabulary}")
        return ids

    def _sampling(self, ask: Ask, prompt: int, seed: int) -> Sampling:
        """For a prompt of so many tokens."""
        name, wanted = ask.wanted()
        if wanted is not None and wanted > self.max_tokens:
            raise ApiError(400, f"{name}: must be at most {self.max_tokens} on this server, not {wanted}", param=name)
        left = self.context - prompt
        if left < (wanted or 1):
            raise self._too_long(ask, f"has {prompt} tokens, and with {wanted or 1} new ones that is more than the {self.context} that fit")
        return Sampling(
            max_tokens=wanted or min(left, self.max_tokens), temperature=ask.temperature, top_p=ask.top_p, top_k=ask.top_k, seed=seed,
            stop=tuple(ask.stop), presence_penalty=ask.presence_penalty, frequency_penalty=ask.frequency_penalty, bias=ask.logit_bias,
        )  # fmt: skip

    def _too_long(self, ask: Ask, why: str) -> ApiError:
        return ApiError(400, f"the prompt {why}", param=ask.where, code="context_length_exceeded")
