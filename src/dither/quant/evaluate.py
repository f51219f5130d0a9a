"""Opens whatever a user names as a model, float or few-bit, ready to run."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn

from dither import models
from dither.errors import UsageError
from dither.quant.checkpoint import is_checkpoint, load

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def open_model(name: str, dtype: str = "float32") -> tuple[nn.Module, Any]:
    """``(model, tokenizer)`` of a hub id, a folder, a GGUF file, ``smollm2``, or a checkpoint of ours; the tokenizer None where there is none.

    Raises UsageError (unknown ``dtype``), ModelError, CheckpointError.
    """
    if dtype not in DTYPES:
        raise UsageError(f"--dtype {dtype}: must be one of {', '.join(DTYPES)}")
    if not sys.stderr.isatty():
        from transformers.utils import logging

        logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # bars in a log file are noise
    if is_checkpoint(name):
        return load(name, dtype=DTYPES[dtype])
    return models.load(name, dtype=DTYPES[dtype])
