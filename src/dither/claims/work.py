"""The work that language-model claims are measured on: SmolLM2-135M, WikiText-2 where it is there, else the embedded text."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

from dither import models
from dither.quant import Chain, Method, perplexity, quantize
from dither.quant.evaluate import open_model

MODEL = "smollm2"
WINDOWS, LENGTH = 4, 2048
SAMPLES, TOKENS = 64, 512


@lru_cache(maxsize=1)
def texts() -> tuple[Any, str, str]:
    """(calibration, evaluation text, what they are)."""
    folder = os.environ.get("DITHER_DATA")
    if folder:
        valid, test = Path(folder) / "text/wiki.valid.tokens", Path(folder) / "text/wiki.test.tokens"
        if valid.is_file() and test.is_file():
            return valid, models.read_text(test), "WikiText-2 (calibration: valid, judged on: test)"
    return None, models.embedded_text("evaluation"), "the embedded text (DITHER_DATA is not set)"


@lru_cache(maxsize=1)
def float_perplexity() -> float:
    model, tokenizer = open_model(MODEL)
    return perplexity(model, texts()[1], tokenizer, windows=WINDOWS, length=LENGTH).perplexity


def measured(recipe: Method | Chain, seed: int, say: Callable[[str], None], label: str) -> dict[str, float]:
    """Quantize and judge: perplexity, true bits, mean output error of the layers."""
    calibration, text, _ = texts()
    with tempfile.TemporaryDirectory() as folder:
        result = quantize(MODEL, recipe, calibration, Path(folder) / "out", samples=SAMPLES, length=TOKENS, seed=seed)
        model, tokenizer = open_model(str(result.out))
        value = perplexity(model, text, tokenizer, windows=WINDOWS, length=LENGTH).perplexity
    errors = [row.output_error for row in result.report.layers if row.output_error is not None]
    say(f"  {label}: perplexity {value:.2f} at {result.bits_per_weight:.3f} bits")
    found = {f"{label} perplexity": value, f"{label} bits": result.bits_per_weight}
    if errors:
        found[f"{label} output error"] = sum(errors) / len(errors)
    return found


def gap_closed(figures: dict[str, float], method: str, baseline: str) -> float:
    """Share of the log-perplexity gap between baseline and float that a method closes."""
    from math import log

    low, high = log(figures["float perplexity"]), log(figures[f"{baseline} perplexity"])
    return (high - log(figures[f"{method} perplexity"])) / (high - low)
