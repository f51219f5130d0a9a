"""Top-1 accuracy of a classifier: the share of images whose largest logit is that of their label."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dither.quant.linear import decoded


@dataclass(frozen=True)
class Accuracy:
    """``accuracy`` in [0, 1], on how many images, and how long it took. ``float()`` gives the accuracy."""

    accuracy: float
    images: int
    seconds: float

    def __float__(self) -> float:
        return self.accuracy


@torch.inference_mode()
def accuracy(
    model: nn.Module | Any, images: Tensor, labels: Tensor, *, batch: int = 250, progress: Callable[[int, int], None] | None = None
) -> Accuracy:
    """``images [N, C, H, W]`` float as the model takes them, ``labels [N]`` integers. ``model``: a module (called with the images alone) or a
    `Quantized`; it is judged in eval mode, in the type of its parameters. Ties go to the lower class.

    Raises ValueError for no images, labels that do not fit them or the classes, ``batch`` < 1, and logits that are not finite.
    """
    if batch < 1:
        raise ValueError(f"batch: must be at least 1, not {batch}")
    if len(images) == 0 or labels.shape != images.shape[:1] or labels.is_floating_point():
        raise ValueError(f"labels: must be integers [N] for N >= 1 images, not {labels.dtype} {list(labels.shape)} for {len(images)}")
    network: nn.Module = getattr(model, "model", model) if not isinstance(model, nn.Module) else model
    started, modes = time.perf_counter(), [(m, m.training) for m in network.modules()]
    first = next((p for p in network.parameters() if p.is_floating_point()), images)
    right = 0
    network.eval()
    try:
        with decoded(network):
            for begin in range(0, len(images), batch):
                output = network(images[begin : begin + batch].to(first.device, first.dtype))
                logits = output if isinstance(output, Tensor) else output["logits"] if "logits" in output else output[0]  # (B, classes)
                if not bool(torch.isfinite(logits).all()):
                    raise ValueError(f"the model's logits are not finite from image {begin} on")
                wanted = labels[begin : begin + batch].to(logits.device)
                if int(wanted.min()) < 0 or int(wanted.max()) >= logits.shape[-1]:
                    raise ValueError(f"labels: hold {int(wanted.min())} to {int(wanted.max())}, but the model knows {logits.shape[-1]} classes")
                right += int((logits.argmax(-1) == wanted).sum())
                if progress is not None:
                    progress(min(begin + batch, len(images)), len(images))
    finally:
        for module, training in modes:
            module.training = training
    return Accuracy(right / len(images), len(images), time.perf_counter() - started)
