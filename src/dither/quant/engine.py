"""The engine: one call that takes any model, a recipe and some data, and gives a few-bit model.

    quantize(model_or_path, recipe, calibration, out) -> Quantized

A model that is a chain of repeated blocks is streamed: one block at a time is read from its files, rounded, written, and let go; peak
memory is one block plus the activations of the calibration data. Any other model (several chains, no chain) is one block.
What happens to each block is in `quant.job`.

Its passes run in the *compute type*: bfloat16 where the CPU multiplies it natively, else float32. Weights, grids and roundings are float32,
Hessians float64.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dither import models
from dither.quant.calibration import Calibration, calibration_batches
from dither.quant.checkpoint import load
from dither.quant.job import Job
from dither.quant.outcome import Event, Quantized, Report, peak_memory
from dither.quant.recipe import Chain, Method, Recipe, as_recipe
from dither.quant.store import Store, fingerprint


def compute_dtype() -> torch.dtype:
    """bfloat16 where the CPU multiplies it natively (AVX-512 BF16 or AMX), else float32."""
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if native else torch.float32


@torch.no_grad()
def quantize(
    model: str | Path | nn.Module,
    recipe: Recipe | Method | Chain,
    calibration: Calibration = None,
    out: str | Path | None = None,
    *,
    samples: int | None = None,
    length: int = 512,
    seed: int = 0,
    tokenizer: Any = None,
    overwrite: bool = False,
    batch_tokens: int = 2048,
    compute: torch.dtype | None = None,
    progress: Callable[[Event], None] | None = None,
) -> Quantized:
    """Quantize a model.

    ``model``: a hub id, a folder, a GGUF file, ``"smollm2"``, or any ``torch.nn.Module`` (which is copied, not changed).
    ``calibration``: text, a list of texts, a file or folder of text, tokens ``[N, L]`` int64, a dict of model inputs or a list of
    them (all used as given); None takes the embedded text. ``samples`` x ``length`` tokens are drawn from text under ``seed`` (None: 64).
    For models of images: images ``[N, C, H, W]``, normalised (used as given), or what `models.images` reads, of which ``samples`` are drawn
    (None: 32).
    ``out``: folder of the checkpoint. None keeps the result in memory. ``compute``: type the calibration data runs in.

    Raises ModelError, CheckpointError, CalibrationError, UsageError; ValueError for non-finite weights or activations.
    """
    started, cpu_started = time.perf_counter(), time.process_time()
    plan = as_recipe(recipe)
    source = models.MemorySource(model, tokenizer) if isinstance(model, nn.Module) else models.open(model)
    batches = calibration_batches(plan, source, calibration, samples, length, seed, batch_tokens, tokenizer)
    job = Job(source, plan, batches, compute or compute_dtype(), seed, progress or (lambda event: None))
    store = None
    if out is not None:
        store = Store(
            out,
            {
                "format": 1,
                "model": source.fingerprint(),
                "recipe": plan.to_json(),
                "seed": seed,
                "compute": str(job.compute),
                "calibration": fingerprint(*[t for b in batches for t in b.values()]) if batches else None,
            },
            overwrite=overwrite,
        )
    if store is not None and store.complete:
        report = Report.read(store.out)
        report.notes.append("already complete: nothing was done")
    else:
        with torch.autocast("cpu", enabled=False):  # types are chosen here, whatever surrounds the call
            report = job.run(store)
    report.seconds, report.cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
    report.peak_memory_bytes = peak_memory()
    return Quantized(
        report, store.out if store else None, job.result, lambda out: load(out, model=_float_copy(model))[0]
    )


def _float_copy(model: str | Path | nn.Module) -> nn.Module | None:
    """What to load a checkpoint into, where transformers cannot build the model."""
    is_foreign = isinstance(model, nn.Module) and not hasattr(model, "config")
    return copy.deepcopy(model) if is_foreign else None  # type: ignore[return-value]
