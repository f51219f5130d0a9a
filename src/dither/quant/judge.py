"""Perplexity as the field computes it (GPTQ's protocol, arXiv 2210.17323, and all that follow it).

The text is tokenized once, cut into windows of ``length`` tokens that do not overlap, each window is read on its own, and

    ppl = exp( mean over windows of  mean over positions of  -log p(x_t | x_<t) )

with the first token of each window predicted by nothing. All windows are equally long, so this is the mean over all predicted tokens.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dither import models
from dither.errors import CalibrationError

_ROWS = 256  # rows of logits at a time: V x 4 bytes each


@dataclass(frozen=True)
class Perplexity:
    """``perplexity``, how many tokens were predicted, and how long it took. ``float()`` gives the perplexity."""

    perplexity: float
    tokens: int
    windows: int
    seconds: float

    def __float__(self) -> float:
        return self.perplexity


@torch.inference_mode()
def perplexity(
    model: nn.Module,
    text: str | Path | Tensor,
    tokenizer: Any = None,
    *,
    windows: int | None = None,
    length: int = 2048,
    progress: Callable[[int, int], None] | None = None,
) -> Perplexity:
    """Perplexity of a causal language model on ``text`` (or on token ids ``[N]``), on its first ``windows`` windows (None: all).

    ``model`` is a module or a `Quantized`. Raises CalibrationError where the text is shorter than one window, ValueError where the
    model's output is not finite.
    """
    network: nn.Module = getattr(model, "model", model) if not isinstance(model, nn.Module) else model
    if isinstance(text, Tensor):
        ids = text.reshape(-1)
    else:
        if tokenizer is None:
            raise ValueError("perplexity of a text needs the model's tokenizer")
        content = models.read_text(text) if isinstance(text, Path) else text
        ids = torch.tensor(tokenizer(content, verbose=False)["input_ids"], dtype=torch.int64)
    count = ids.numel() // length if windows is None else windows
    if count < 1 or ids.numel() < count * length:
        raise CalibrationError(
            f"evaluation text: has {ids.numel()} tokens, but {max(count, 1)} windows of {length} were asked for; use fewer or shorter windows"
        )
    started = time.perf_counter()
    device = next(network.parameters()).device
    total = 0.0
    for n in range(count):
        window = ids[None, n * length : (n + 1) * length].to(device)
        total += _loss(network, window)
        if not math.isfinite(total):
            raise ValueError(f"the model's log-likelihood is not finite in window {n}")
        if progress is not None:
            progress(n + 1, count)
    mean = total / count
    value = math.exp(mean) if mean < 700 else math.inf
    return Perplexity(value, count * (length - 1), count, time.perf_counter() - started)


def _loss(model: nn.Module, window: Tensor) -> float:
    """Mean cross-entropy of one window ``[1, L]``, with the logits made a few rows at a time where the head can be split off."""
    body, head = getattr(model, "base_model", None), _head(model)
    targets = window[0, 1:]
    if body is None or body is model or head is None or not _plain_head(model):
        logits = model(input_ids=window, use_cache=False).logits[0, :-1]
        return float(nn.functional.cross_entropy(logits.float(), targets))
    hidden = body(input_ids=window, use_cache=False)[0][0, :-1]  # (L - 1, D)
    total = 0.0
    for begin in range(0, hidden.shape[0], _ROWS):
        logits = head(hidden[begin : begin + _ROWS]).float()
        total += float(nn.functional.cross_entropy(logits, targets[begin : begin + _ROWS], reduction="sum"))
    return total / targets.shape[0]


def _head(model: nn.Module) -> nn.Module | None:
    get = getattr(model, "get_output_embeddings", None)
    return get() if callable(get) else None


_plain: dict[int, bool] = {}


def _plain_head(model: nn.Module) -> bool:
    """Whether logits are exactly head(hidden): proved once a model by running a few tokens both ways (softcaps and scales fail)."""
    key = id(model)
    if key not in _plain:
        device = next(model.parameters()).device
        ids = torch.arange(1, 5, device=device)[None]
        whole = model(input_ids=ids, use_cache=False).logits
        head, body = _head(model), model.base_model
        assert head is not None
        split = head(body(input_ids=ids, use_cache=False)[0])  # type: ignore[operator]
        _plain[key] = whole.shape == split.shape and bool(torch.allclose(whole, split, rtol=1e-4, atol=1e-4))
    return _plain[key]
