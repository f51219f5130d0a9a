"""One token from the scores of all: penalties of what was said, temperature, top-k, top-p, and a generator of the text's own.

    logits'[v] = logits[v] + bias[v] - frequency_penalty count[v] - presence_penalty [count[v] > 0]      count: of v among the tokens made so far
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """``temperature`` 0 takes the likeliest token; ``top_k`` 0 and ``top_p`` 1 keep all tokens; ``bias``: of tokens by id. Raises ValueError out of
    range."""

    max_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    stop: tuple[str, ...] = ()
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    bias: Mapping[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens: must be at least 1, not {self.max_tokens}")
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature: must be 0 or more, not {self.temperature}")
        if not 0 <= self.top_p <= 1:
            raise ValueError(f"top_p: must be 0 to 1, not {self.top_p}")
        if self.top_k < 0:
            raise ValueError(f"top_k: must be 0 or more, not {self.top_k}")
        for name in ("presence_penalty", "frequency_penalty"):
            if not -2 <= getattr(self, name) <= 2:
                raise ValueError(f"{name}: must be -2 to 2, not {getattr(self, name)}")
        if any(token < 0 or not math.isfinite(value) for token, value in self.bias.items()):
            raise ValueError(f"bias: must be finite numbers of tokens, not {dict(self.bias)}")
        if isinstance(self.stop, str) or not all(self.stop):
            raise ValueError(f"stop: must be strings that are not empty, not {self.stop!r}")


class Chooser:
    """Token after token of one text."""

    def __init__(self, sampling: Sampling) -> None:
        self.sampling, self.counts = sampling, Counter[int]()
        self.generator = torch.Generator().manual_seed(sampling.seed)

    def choose(self, logits: Tensor) -> int:
        """From ``logits [V]``, which stay as they are. Raises ValueError where they hold NaN, IndexError where a biased token does not exist."""
        token = pick(self._changed(logits), self.sampling, self.generator)
        self.counts[token] += 1
        return token

    def _changed(self, logits: Tensor) -> Tensor:
        s = self.sampling
        change = dict(s.bias)
        if s.presence_penalty or s.frequency_penalty:
            for token, count in self.counts.items():
                change[token] = change.get(token, 0.0) - s.frequency_penalty * count - s.presence_penalty
        if not change:
            return logits
        logits = logits.clone()
        logits[torch.tensor(list(change))] += torch.tensor(list(change.values()))
        return logits


def pick(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """One token from ``logits [V]``. Raises ValueError where they hold NaN."""
    greatest = int(logits.numpy().argmax())  # NaN counts as the greatest; a tenth of the time of torch's
    if math.isnan(logits[greatest]):
        raise ValueError("the model's output is not finite")
    if sampling.temperature == 0:
        return greatest
    scaled = (
        logits - logits[greatest]
    ) / sampling.temperature  # the largest is 0: nothing overflows, however low the temperature
    if 0 < sampling.top_k < scaled.shape[0]:
        scaled[scaled < scaled.topk(sampling.top_k).values[-1]] = -torch.inf
    p = scaled.softmax(-1)
    if sampling.top_p < 1:
        ordered, order = p.sort(descending=True, stable=True)
        beyond = ordered.cumsum(0) - ordered >= sampling.top_p  # the likelier ones already hold top_p
        beyond[0] = False
        p[order[beyond]] = 0
    return int(torch.multinomial(p, 1, generator=generator))
