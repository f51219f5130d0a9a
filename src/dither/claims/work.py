"""The work that language-model claims are measured on: SmolLM2-135M, WikiText-2 where it is there, else the embedded text.

Sized so that a claim ends in minutes on two cores: short calibration, four evaluation windows. What no seed changes (the float model, methods
without data) is measured once a process.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from functools import lru_cache
from math import log
from pathlib import Path

from dither import models
from dither.quant import Chain, Method, Recipe, perplexity, quantize
from dither.quant.evaluate import open_model
from dither.quant.recipe import as_recipe

MODEL = "smollm2"
WINDOWS, LENGTH = 4, 2048
SAMPLES, TOKENS = 16, 512
WORK = (
    f"SmolLM2-135M-Instruct, groups of 64, {SAMPLES} x {TOKENS} calibration tokens, "
    f"perplexity on {WINDOWS} windows of {LENGTH} tokens"
)
CAVEAT = "The float weights are themselves 4-bit (Q4_1, groups of 32), which flatters 4-bit results; 3 bits are not on that grid."


@lru_cache(maxsize=1)
def texts() -> tuple[Path | None, str, str]:
    """(calibration, evaluation text, what they are). A calibration of None is the embedded text."""
    folder = os.environ.get("DITHER_DATA")
    if folder:
        valid, test = Path(folder) / "text/wiki.valid.tokens", Path(folder) / "text/wiki.test.tokens"
        if valid.is_file() and test.is_file():
            return valid, models.read_text(test), "WikiText-2 (calibrated on valid, judged on test)"
    why = "DITHER_DATA is not set" if not folder else "DITHER_DATA has no WikiText-2"
    return None, models.embedded_text("evaluation"), f"the embedded text ({why})"


def data() -> str:
    """What the figures are measured on."""
    return texts()[2]


@lru_cache(maxsize=1)
def float_perplexity() -> float:
    model, tokenizer = open_model(MODEL)
    return perplexity(model, texts()[1], tokenizer, windows=WINDOWS, length=LENGTH).perplexity


_seedless: dict[str, dict[str, float]] = {}


def measured(
    recipe: Recipe | Method | Chain, seed: int, say: Callable[[str], None], label: str
) -> dict[str, float]:
    """Quantize and judge: ``{"LABEL perplexity", "LABEL bits", "LABEL output error"}``, the last the layers' mean where inputs were seen.

    A recipe without data gives the same figures under every seed, so it runs once.
    """
    key = f"{label}: {recipe!r}"
    if key in _seedless:
        return _seedless[key]
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
    if not as_recipe(recipe).needs_data:
        _seedless[key] = found
    return found


def gap_closed(figures: dict[str, float], method: str, baseline: str) -> float:
    """Share of the log-perplexity gap between baseline and float that a method closes."""
    low, high = log(figures["float perplexity"]), log(figures[f"{baseline} perplexity"])
    return (high - log(figures[f"{method} perplexity"])) / (high - low)
