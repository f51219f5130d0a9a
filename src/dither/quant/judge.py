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
from dither.errors import CalibrationError, UsageError
from dither.quant.stepping import positions
from dither.special import logsumexp

_ROWS = 256  # rows of logits at a time: V x 2 or 4 bytes each


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

    ``model`` is a module or a `Quantized`; it is judged in eval mode. Logits are made 256 rows at a time where they are plainly the head of
    the hidden states, and all ``length`` at once where the model does more to them (softcaps, scales). Few-bit weights are decoded anew for
    each window: its arithmetic costs tens of times more.

    Raises CalibrationError where the text is shorter than the windows asked for, UsageError where a window is longer than the model's
    positions, ValueError for windows < 1, length < 2, tokens that are no integers or that the model does not know, and output that is not
    finite.
    """
    if windows is not None and windows < 1:
        raise ValueError(f"windows: must be at least 1, not {windows}")
    if length < 2:
        raise ValueError(f"length: a window needs 2 tokens or more, not {length}")
    network: nn.Module = getattr(model, "model", model) if not isinstance(model, nn.Module) else model
    limit = positions(network)
    if limit is not None and length > limit:
        raise UsageError(
            f"length: windows of {length} tokens do not fit the model's {limit} positions; use --length {limit}"
        )
    ids = _tokens(text, tokenizer)
    count = ids.numel() // length if windows is None else windows
    if count < 1 or ids.numel() < count * length:
        raise CalibrationError(
            f"evaluation text: has {ids.numel()} tokens, but {max(count, 1)} windows of {length} were asked for; "
            "use fewer or shorter windows"
        )
    ids = ids[: count * length].view(count, length)
    known = getattr(_call(network, "get_input_embeddings"), "num_embeddings", None)
    if int(ids.min()) < 0 or (known is not None and int(ids.max()) >= known):
        raise ValueError(
            f"text: holds tokens {int(ids.min())} to {int(ids.max())}, but the model knows 0 to {(known or 0) - 1}"
        )
    started, modes = time.perf_counter(), [(m, m.training) for m in network.modules()]
    device = next(network.parameters()).device
    total = 0.0
    network.eval()
    try:
        head = _plain_head(network, ids[:1, :4].to(device))
        for n in range(count):
            total += _loss(network, ids[n : n + 1].to(device), head)
            if not math.isfinite(total):
                raise ValueError(f"the model's log-likelihood is not finite in window {n}")
            if progress is not None:
                progress(n + 1, count)
    finally:
        for module, training in modes:
            module.training = training
    mean = total / count
    value = math.exp(mean) if mean < 700 else math.inf
    return Perplexity(value, count * (length - 1), count, time.perf_counter() - started)


def _tokens(text: str | Path | Tensor, tokenizer: Any) -> Tensor:
    """Token ids ``[N]`` int64."""
    if isinstance(text, Tensor):
        if text.is_floating_point() or text.is_complex() or text.dtype == torch.bool or text.dim() not in (1, 2):
            raise ValueError(f"text: tokens must be integers [N], not {text.dtype} of shape {tuple(text.shape)}")
        return text.reshape(-1).to("cpu", torch.int64)
    if tokenizer is None:
        raise ValueError("tokenizer: perplexity of a text needs the model's; it has none, or it was not given")
    content = models.read_text(text) if isinstance(text, Path) else text
    return torch.tensor(tokenizer(content, verbose=False)["input_ids"], dtype=torch.int64)


def _loss(model: nn.Module, window: Tensor, head: nn.Module | None) -> float:
    """Mean cross-entropy of one window ``[1, L]``; with ``head``, the logits are made from the hidden states, a few rows at a time."""
    targets = window[0, 1:]
    if head is None:
        logits = model(input_ids=window, use_cache=False).logits[0, :-1]  # (L - 1, V)
        return _surprise(logits, targets) / targets.shape[0]
    hidden = _body(model)(input_ids=window, use_cache=False)[0][0, :-1]  # (L - 1, D)
    total = 0.0
    for begin in range(0, hidden.shape[0], _ROWS):
        logits = head(hidden[begin : begin + _ROWS])  # (rows, V)
        total += _surprise(logits, targets[begin : begin + _ROWS])
    return total / targets.shape[0]


def _surprise(logits: Tensor, targets: Tensor) -> float:
    """Sum of -log softmax(logits)_target over rows ``[rows, V]``, in float32 or better. Log-sum-exp reads the logits once, in the type that they
    have, where log-softmax writes as many: benchmarks/records/softmax.json has the times of both."""
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    seen = logits.gather(1, targets[:, None])[:, 0]  # (rows,)
    return float((logsumexp(logits, dtype=wide).double() - seen.double()).sum())


def _plain_head(model: nn.Module, ids: Tensor) -> nn.Module | None:
    """The head, if the logits are exactly what it makes of the last hidden states: proved by reading ``ids [1, n]`` both ways, on
    which they agree to the last bit (softcaps and scales do not)."""
    head, body = _call(model, "get_output_embeddings"), getattr(model, "base_model", None)
    if not isinstance(head, nn.Module) or not isinstance(body, nn.Module) or body is model:
        return None
    whole = model(input_ids=ids, use_cache=False).logits
    hidden = body(input_ids=ids, use_cache=False)[0]
    if hidden.dim() != 3 or hidden.shape[-1] != getattr(head, "in_features", hidden.shape[-1]):
        return None
    split = head(hidden)
    same = whole.shape == split.shape and torch.equal(whole.float(), split.float())
    return head if same else None


def _body(model: nn.Module) -> nn.Module:
    body: nn.Module = model.base_model  # type: ignore[assignment]  # a property of transformers' models
    return body


def _call(model: nn.Module, method: str) -> Any:
    """What ``model.method()`` gives, or None where the model has no such method."""
    found = getattr(model, method, None)
    return found() if callable(found) else None
