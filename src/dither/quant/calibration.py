"""Calibration data as model inputs, batch by batch: text, tokens, images, or what the model takes as it is."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dither import models
from dither.errors import CalibrationError, UsageError
from dither.quant.recipe import Recipe

IMAGES = 16  # a batch
Calibration = Any  # text, texts, a path, tokens [N, L], images [N, C, H, W], a dict of tensors, or a list of dicts


def calibration_batches(
    recipe: Recipe,
    source: models.Source,
    calibration: Calibration,
    samples: int | None,
    length: int,
    seed: int,
    batch_tokens: int,
    tokenizer: Any = None,
) -> list[dict[str, Tensor]]:
    """The calibration data as model inputs, cut into batches of about ``batch_tokens`` tokens (images: `IMAGES`). Empty if no part needs data."""
    if isinstance(calibration, Tensor) and calibration.is_floating_point() and calibration.dim() == 4:
        if len(calibration) == 0:
            raise UsageError("calibration: holds no images")
        return _image_batches(source, models.normalised(calibration, source.config, {}))
    if isinstance(calibration, dict):
        calibration = [calibration]
    if isinstance(calibration, Sequence) and not isinstance(calibration, str):
        if len(calibration) == 0:
            raise CalibrationError("calibration: is empty; give text, tokens or model inputs")
        if isinstance(calibration[0], dict):
            if sample_count(calibration) == 0:
                raise UsageError("calibration: holds no samples")
            for name, value in ((n, v) for batch in calibration for n, v in batch.items()):
                if isinstance(value, Tensor) and value.is_floating_point() and not bool(torch.isfinite(value).all()):
                    raise ValueError(f"calibration: {name} holds NaN or inf")
            return list(calibration)
    if not recipe.needs_data:
        return []
    if models.takes_images(source.config) and (calibration is None or isinstance(calibration, str | Path)):
        return _image_batches(source, models.calibration_images(calibration, source, samples=32 if samples is None else samples, seed=seed))
    if tokenizer is None and not isinstance(calibration, Tensor):
        tokenizer = source.tokenizer()
    tokens = models.calibration_tokens(calibration, tokenizer, samples=64 if samples is None else samples, length=length, seed=seed)
    return [{"input_ids": part} for part in torch.split(tokens, max(1, batch_tokens // tokens.shape[1]))]


def _image_batches(source: models.Source, images: Tensor) -> list[dict[str, Tensor]]:
    """Images ``[N, C, H, W]`` under the name of the model's input: transformers' for pictures, else the first argument of ``forward``."""
    name = "pixel_values" if source.config is not None else next(iter(inspect.signature(source.skeleton().forward).parameters))
    return [{name: part} for part in torch.split(images, IMAGES)]


def sample_count(batches: Sequence[dict[str, Tensor]]) -> int:
    """Sequences or images of the calibration data."""
    return sum(next((t.shape[0] for t in batch.values() if isinstance(t, Tensor) and t.dim()), 0) for batch in batches)


def token_sample(config: Any) -> dict[str, Tensor] | None:
    """Token ids to prove structure with, where a recipe comes without data: two rows of 16. None for models of anything but tokens."""
    size = getattr(config, "vocab_size", None)
    return (
        None if not isinstance(size, int) or size < 2 else {"input_ids": (torch.arange(32) * 7919 % size).view(2, 16)}
    )


def floats_as(batch: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The same inputs with floating ones (pixels, spectra) in the compute type."""
    return {k: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in batch.items()}
