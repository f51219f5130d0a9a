"""LLM-FP4 (arXiv 2310.16836): searched float formats and exponents shifted a channel make 4-bit weights and inputs usable, with static scales."""

from __future__ import annotations

import tempfile
from functools import lru_cache
from pathlib import Path

from dither.claims.claim import Claim, Figures, Say, Test
from dither.claims.work import (
    LENGTH,
    MODEL,
    SAMPLES,
    TOKENS,
    WINDOWS,
    data,
    float_perplexity,
    gap_closed,
    measured,
    texts,
)
from dither.quant import perplexity, quantize
from dither.quant.evaluate import open_model
from dither.quant.recipes import LLMFP4, RTN

CANDIDATES, ROWS = 31, 256  # of the search: a third of the method's default, and half of its rows, so that a seed ends in minutes
PROBED = tuple[Figures, dict[str, float]]


def searched(bits: int = 4, **knobs: object) -> LLMFP4:
    return LLMFP4(bits=bits, act_bits=bits, candidates=CANDIDATES, max_rows=ROWS, **knobs)  # type: ignore[arg-type]


MINMAX = {"rounds": 0, "preshift": False}
ARMS = {
    "MinMax INT4": searched(formats="e1m2", **MINMAX),
    "MinMax E2M1": searched(formats="e2m1", **MINMAX),
    "baseline": searched(preshift=False),
    "FPQ": searched(),
    "FPQ E2M1 only": searched(formats="e2m1"),
    "W8A8 E4M3": searched(8, formats="e4m3"),
    "W8A8 E3M4": searched(8, formats="e3m4"),
}
PER_TOKEN = {  # other granularity: a scale a token, made at run time
    "per-token INT4": RTN(bits=4, group=None, act_bits=4),
    "per-token FP4": RTN(format="e2m1", group=None, act_format="e2m1"),
    "per-token W8A8 E4M3": RTN(bits=8, format="e4m3", group=None, act_format="e4m3"),
    "per-token W8A8 E3M4": RTN(bits=8, format="e3m4", group=None, act_format="e3m4"),
}


def probe(method: LLMFP4, seed: int, say: Say, label: str) -> PROBED:
    """Perplexity, bits, the layers' mean output error with weights and inputs rounded; and each layer's error."""
    calibration, text, _ = texts()
    with tempfile.TemporaryDirectory() as folder:
        result = quantize(MODEL, method, calibration, Path(folder) / "out", samples=SAMPLES, length=TOKENS, seed=seed)
        model, tokenizer = open_model(str(result.out))
        value = perplexity(model, text, tokenizer, windows=WINDOWS, length=LENGTH).perplexity
    layers = [row for row in result.report.layers if row.facts]
    errors = {row.name: float(row.facts["error"]) for row in layers}
    mean = sum(errors.values()) / len(errors)
    say(f"  {label}: perplexity {value:.2f}, output error {mean:.4f} at {result.bits_per_weight:.3f} bits")
    found = {f"{label} perplexity": value, f"{label} bits": result.bits_per_weight, f"{label} output error": mean}
    if label == "FPQ":
        found["std of log2 channel maxima"] = sum(row.facts["between"] for row in layers) / len(layers)
        found["log2 of a channel's maximum over its rms"] = sum(row.facts["within"] for row in layers) / len(layers)
        found["FPQ share of clipped inputs"] = sum(row.facts["clipped"] for row in layers) / len(layers)
    return found, errors


@lru_cache(maxsize=1)
def per_token() -> Figures:
    """The references that need no data, so no seed."""
    figures: Figures = {}
    for label, method in PER_TOKEN.items():
        figures |= measured(method, 0, print, label)
    return figures


def measure(seed: int, say: Say) -> Figures:
    figures: Figures = {"float perplexity": float_perplexity(), **per_token()}
    errors = {}
    for label, method in ARMS.items():
        found, errors[label] = probe(method, seed, say, label)
        figures |= found
    return figures | orders(errors)


def orders(errors: dict[str, dict[str, float]]) -> Figures:
    """Shares of the layers in which each step of the method lowers the output error, or leaves it."""

    def share(better: str, worse: str) -> float:
        names = errors[better]
        return sum(errors[better][n] <= errors[worse][n] for n in names) / len(names)

    return {
        "layers with baseline <= MinMax E2M1": share("baseline", "MinMax E2M1"),
        "layers with FPQ <= baseline": share("FPQ", "baseline"),
    }


CLAIM = Claim(
    name="llm-fp4",
    sentence="Searching float formats and ranges, and shifting exponents a channel, quantizes weights and inputs to 4-bit floats after training.",
    source="Liu et al., EMNLP 2023, arXiv 2310.16836, tables 1 and 2; repository nbasyl/LLM-FP4",
    work=(
        f"SmolLM2-135M-Instruct, W4A4 and W8A8, one static scale a tensor of inputs, {SAMPLES} x {TOKENS} calibration tokens ({ROWS} rows judged, "
        f"{CANDIDATES} ranges tried), embeddings and head float, perplexity on {WINDOWS} windows of {LENGTH} tokens"
    ),
    data=data,
    measure=measure,
    paper={
        "LLaMA-7B 4/4/4 average accuracy, MinMax INT4": 38.1,
        "LLaMA-7B 4/4/4 average accuracy, MinMax E2M1": 37.4,
        "LLaMA-7B 4/4/4 average accuracy, baseline": 42.7,
        "LLaMA-7B 4/4/4 average accuracy, FPQ": 58.1,
        "LLaMA-7B average accuracy, float": 66.3,
    },
    tests=(
        Test(
            "the search lowers the output error of at least 95 % of the layers below MinMax E2M1's",
            lambda f: f["layers with baseline <= MinMax E2M1"] >= 0.95,
        ),
        Test("the shift lowers it further in at least 95 % of the layers", lambda f: f["layers with FPQ <= baseline"] >= 0.95),
        Test(
            "the mean output error of FPQ is at most 0.75 of the baseline's",
            lambda f: f["FPQ output error"] <= 0.75 * f["baseline output error"],
        ),
        Test(
            "perplexity: FPQ below the baseline, the baseline below both MinMax arms",
            lambda f: (
                f["FPQ perplexity"]
                < f["baseline perplexity"]
                < min(f["MinMax INT4 perplexity"], f["MinMax E2M1 perplexity"])
            ),
        ),
        Test(
            "FPQ closes at least half of the log-perplexity gap between MinMax INT4 and float",
            lambda f: gap_closed(f, "FPQ", "MinMax INT4") >= 0.5,
        ),
        Test(
            "W8A8 floats are within 1 % of float perplexity",
            lambda f: f["W8A8 E4M3 perplexity"] <= 1.01 * f["float perplexity"],
        ),
        Test(
            "W8A8 floats are within 0.5 % of float perplexity with a mantissa bit more (E3M4) and a scale a token",
            lambda f: f["per-token W8A8 E3M4 perplexity"] <= 1.005 * f["float perplexity"],
        ),
    ),
    caveat=(
        "The float weights are themselves 4-bit (Q4_1, groups of 32); the part of the inputs is not flattered by that. "
        "The paper rounds embeddings and head too. Per-token references have finer scales; at 8 bits, those and E3M4 tell apart what static ranges "
        "and what three mantissa bits cost."
    ),
)
