"""Trains the vision model that dither ships as ``vit-fashion``, on Fashion-MNIST (MIT licence), and measures it.

    apt-get install dataset-fashion-mnist
    OMP_WAIT_POLICY=passive nice python benchmarks/train_vit.py

The policy keeps threads from spinning while others work. More epochs make a better model: --epochs.

Writes a folder: config.json, model.safetensors (float16), preprocessor_config.json and record.json, which has the accuracy on the test images, the
ratio of the largest to the median channel range behind every norm (what methods for activations have to cope with), time and machine. The same
arguments, versions, processor and number of threads give the same weights.

The recipe is that of small vision transformers: AdamW with warm-up and cosine, decay on matrices only (decayed norm factors would hide the channels
with large ranges), flips and shifts by up to two pixels, label smoothing, bfloat16 products.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from dither import models
from dither.errors import DitherError
from dither.models import fashion
from dither.quant.machine import machine

BATCH, LEARNING_RATE, WARM_UP, DECAY, SMOOTHING, SHIFT = 128, 1e-3, 300, 0.05, 0.1, 2
BETAS = (0.9, 0.999)
RANGED = 512  # training images that the channel ranges are measured on
NAMES = ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"]


def build() -> nn.Module:
    """49 tokens of 4 x 4 pixels and a class token, 128 channels, 6 layers of 4 heads: 1.2 million weights."""
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        image_size=fashion.SIDE, num_channels=1, patch_size=4, hidden_size=128, num_hidden_layers=6, num_attention_heads=4, intermediate_size=512,
        hidden_act="gelu", qkv_bias=True, layer_norm_eps=1e-6, id2label=dict(enumerate(NAMES)), label2id={n: i for i, n in enumerate(NAMES)},
    )  # fmt: skip
    # "eager": for 50 tokens the plain products train in half the time of torch's fused attention
    return ViTForImageClassification._from_config(config, attn_implementation="eager")


def augmented(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image mirrored or not, and shifted by up to two pixels each way; black comes in. ``[B, 28, 28]``."""
    count = len(images)
    padded = functional.pad(images, (SHIFT,) * 4)  # (B, 32, 32)
    down, right = torch.randint(2 * SHIFT + 1, (2, count, 1), generator=generator)
    rows, columns = down + torch.arange(fashion.SIDE), right + torch.arange(fashion.SIDE)  # (B, 28)
    mirrored = torch.rand(count, 1, generator=generator) < 0.5
    columns = torch.where(mirrored, columns.flip(1), columns)
    return padded[torch.arange(count)[:, None, None], rows[:, :, None], columns[:, None, :]]


def batches(count: int, epochs: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Indices of the images of every step."""
    for _ in range(epochs):
        yield from torch.randperm(count, generator=generator).split(BATCH)


def rate(step: int, steps: int) -> float:
    """The learning rate of a step, as a part of its peak: a line up, half a cosine down."""
    if step < WARM_UP:
        return (step + 1) / WARM_UP
    return 0.5 * (1 + math.cos(math.pi * (step - WARM_UP) / max(steps - WARM_UP, 1)))


def optimizer(model: nn.Module) -> torch.optim.AdamW:
    """Decay on the matrices of linear maps (the patch embedding is one), on nothing else."""
    decayed = [m.weight for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    chosen = {id(p) for p in decayed}
    others = [p for p in model.parameters() if id(p) not in chosen]
    groups = [{"params": decayed, "weight_decay": DECAY}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=BETAS)


def train(model: nn.Module, images: Tensor, labels: Tensor, epochs: int, seed: int) -> int:
    """Train in place; returns the number of steps. Says how it goes every 50."""
    generator = torch.Generator().manual_seed(seed)
    steps = epochs * math.ceil(len(images) / BATCH)
    adam = optimizer(model.train())
    schedule = torch.optim.lr_scheduler.LambdaLR(adam, lambda step: rate(step, steps))
    began, shown, total = time.perf_counter(), 0, 0.0
    for step, chosen in enumerate(batches(len(images), epochs, generator), 1):
        inputs = fashion.vit_inputs(augmented(images[chosen], generator))
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(inputs).logits
        loss = functional.cross_entropy(logits.float(), labels[chosen], label_smoothing=SMOOTHING)
        loss.backward()
        adam.step()
        adam.zero_grad()
        schedule.step()
        total += float(loss.detach())
        if step % 50 == 0 or step == steps:
            each = (time.perf_counter() - began) / step
            print(f"step {step}/{steps}  loss {total / (step - shown):.3f}  {each:.2f} s a step, {each * (steps - step):.0f} s to go", flush=True)
            shown, total = step, 0.0
    return steps


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """The part of images whose label the model finds."""
    right = 0
    for some, wanted in zip(images.split(500), labels.split(500), strict=True):
        right += int((model(fashion.vit_inputs(some)).logits.argmax(-1) == wanted).sum())
    return right / len(images)


@torch.no_grad()
def range_ratios(model: nn.Module, images: Tensor) -> dict[str, float]:
    """Of every norm: the largest range (maximum - minimum over images and tokens) of an output channel, over the median one."""
    low: dict[str, Tensor] = {}
    high: dict[str, Tensor] = {}

    def watch(name: str) -> Any:
        def hook(module: nn.Module, arguments: Any, output: Tensor) -> None:
            values = output.flatten(0, -2)  # (B T, D)
            low[name] = torch.minimum(low.get(name, values[0]), values.amin(0))
            high[name] = torch.maximum(high.get(name, values[0]), values.amax(0))

        return hook

    handles = [m.register_forward_hook(watch(n)) for n, m in model.named_modules() if isinstance(m, nn.LayerNorm)]
    for some in images.split(128):
        model(fashion.vit_inputs(some))
    for handle in handles:
        handle.remove()
    ranges = {name: high[name] - low[name] for name in low}
    return {name: round(float(r.max() / r.median()), 3) for name, r in ranges.items()}


def save(model: nn.Module, out: Path) -> None:
    """The model in float16, and how its inputs are made from pixels."""
    model.half().save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)  # it comes readable by its owner alone, and would be packaged like that
    preprocessor = {
        "image_processor_type": "ViTImageProcessor", "do_resize": False, "size": {"height": fashion.SIDE, "width": fashion.SIDE},
        "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": [fashion.MEAN], "image_std": [fashion.STD],
    }  # fmt: skip
    write(out / "preprocessor_config.json", preprocessor)


def write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def measured(out: Path, data: Path | None) -> dict[str, Any]:
    """What the saved folder, read as a user would read it, is worth."""
    model, _ = models.load(out)
    ratios = range_ratios(model, fashion.fashion_mnist("train", data)[0][:RANGED])
    inner = {name: ratio for name, ratio in ratios.items() if ".layers." in name}  # the last norm feeds only the head
    return {
        "accuracy": accuracy(model, *fashion.fashion_mnist("test", data)),
        "range_ratio": ratios,
        "largest_range_ratio": max(inner.values()),
        "some_range_ratio_above_3": max(inner.values()) > 3,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(description="Train the vision model that dither ships as vit-fashion.")
    parser.add_argument("--data", type=Path, help="folder of the gzipped IDX files (default: Debian's if it is there, else DITHER_DATA)")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--out", type=Path, default=fashion.FOLDER, help="folder to write (default: the one in the package)")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    if given.epochs < 1:
        parser.error(f"--epochs must be positive, got {given.epochs}")
    data = given.data or (fashion.DEBIAN if fashion.DEBIAN.is_dir() else None)
    try:
        file, _ = fashion.fashion_files("train", data)
        images, labels = fashion.fashion_mnist("train", data)
        fashion.fashion_mnist("test", data)  # now, not after a quarter of an hour
    except DitherError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(given.seed)
    model = build()
    pixels = images.double() / 255
    print(f"{len(images)} images of {file} (mean {pixels.mean():.4f}, deviation {pixels.std():.4f}), {torch.get_num_threads()} threads", flush=True)
    began = time.perf_counter()
    steps = train(model, images, labels, given.epochs, given.seed)
    seconds = time.perf_counter() - began
    save(model, given.out)
    record = {
        "command": f"python benchmarks/train_vit.py --epochs {given.epochs} --seed {given.seed}",
        "data": {
            "name": "Fashion-MNIST", "licence": "MIT", "file": file.name, "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
            "images": len(images), "mean": round(float(pixels.mean()), 4), "deviation": round(float(pixels.std()), 4),
        },
        "recipe": {
            "optimizer": "AdamW", "learning_rate": LEARNING_RATE, "betas": BETAS, "weight_decay": DECAY, "warm_up": WARM_UP, "schedule": "cosine",
            "batch": BATCH, "epochs": given.epochs, "steps": steps, "label_smoothing": SMOOTHING, "shift": SHIFT, "flip": True,
            "autocast": "bfloat16", "seed": given.seed,
        },
        "parameters": sum(p.numel() for p in model.parameters()),
        **measured(given.out, data),
        "seconds": round(seconds, 1),
        **machine(),
    }  # fmt: skip
    write(given.out / "record.json", record)
    print(f"accuracy {record['accuracy']:.4f}, range ratios up to {record['largest_range_ratio']}, {seconds:.0f} s: {given.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
