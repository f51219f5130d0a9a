"""Trains the vision model that dither ships as ``vit-fashion``, on Fashion-MNIST (MIT licence), and measures it.

    apt-get install dataset-fashion-mnist
    python benchmarks/train_vit.py --device cuda --epochs 100 --batch 512 --rate 2e-3
    OMP_WAIT_POLICY=passive nice python benchmarks/train_vit.py --epochs 2               # a quarter of an hour on two cores

The policy keeps threads from spinning while others work. --width, --depth and --heads make other sizes.

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
import os
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

WARM_UP, DECAY, SMOOTHING, SHIFT = 300, 0.05, 0.1, 2
BETAS = (0.9, 0.999)
RANGED = 512  # training images that the channel ranges are measured on
NAMES = ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"]


def build(width: int = 128, depth: int = 6, heads: int = 4) -> nn.Module:
    """49 tokens of 4 x 4 pixels and a class token; by default 128 channels, 6 layers of 4 heads: 1.2 million weights."""
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        image_size=fashion.SIDE, num_channels=1, patch_size=4, hidden_size=width, num_hidden_layers=depth, num_attention_heads=heads,
        intermediate_size=4 * width, hidden_act="gelu", qkv_bias=True, layer_norm_eps=1e-6,
        id2label=dict(enumerate(NAMES)), label2id={n: i for i, n in enumerate(NAMES)},
    )  # fmt: skip
    # "eager": for 50 tokens the plain products train in half the time of torch's fused attention
    return ViTForImageClassification._from_config(config, attn_implementation="eager")


def augmented(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image mirrored or not, and shifted by up to two pixels each way; black comes in. ``[B, 28, 28]``."""
    count = len(images)
    padded = functional.pad(images, (SHIFT,) * 4)  # (B, 32, 32)
    here = images.device
    down, right = torch.randint(2 * SHIFT + 1, (2, count, 1), generator=generator, device=here)
    side = torch.arange(fashion.SIDE, device=here)
    rows, columns = down + side, right + side  # (B, 28)
    mirrored = torch.rand(count, 1, generator=generator, device=here) < 0.5
    columns = torch.where(mirrored, columns.flip(1), columns)
    return padded[torch.arange(count, device=here)[:, None, None], rows[:, :, None], columns[:, None, :]]


def batches(count: int, epochs: int, batch: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Indices of the images of every step."""
    for _ in range(epochs):
        yield from torch.randperm(count, generator=generator, device=generator.device).split(batch)


def rate(step: int, steps: int) -> float:
    """The learning rate of a step, as a part of its peak: a line up, half a cosine down."""
    if step < WARM_UP:
        return (step + 1) / WARM_UP
    return 0.5 * (1 + math.cos(math.pi * (step - WARM_UP) / max(steps - WARM_UP, 1)))


def optimizer(model: nn.Module, peak: float = 1e-3) -> torch.optim.AdamW:
    """Decay on the matrices of linear maps (the patch embedding is one), on nothing else."""
    decayed = [m.weight for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    chosen = {id(p) for p in decayed}
    others = [p for p in model.parameters() if id(p) not in chosen]
    groups = [{"params": decayed, "weight_decay": DECAY}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=peak, betas=BETAS)


def train(model: nn.Module, images: Tensor, labels: Tensor, epochs: int, batch: int, peak: float, seed: int) -> int:
    """Train in place, where the model lies; returns the number of steps. Says how it goes every 50."""
    here = next(model.parameters()).device
    images, labels = images.to(here), labels.to(here)
    generator = torch.Generator(here).manual_seed(seed)
    steps = epochs * math.ceil(len(images) / batch)
    adam = optimizer(model.train(), peak)
    schedule = torch.optim.lr_scheduler.LambdaLR(adam, lambda step: rate(step, steps))
    began, shown, total = time.perf_counter(), 0, torch.zeros((), device=here)
    for step, chosen in enumerate(batches(len(images), epochs, batch, generator), 1):
        inputs = fashion.vit_inputs(augmented(images[chosen], generator))
        with torch.autocast(here.type, torch.bfloat16):
            logits = model(inputs).logits
        loss = functional.cross_entropy(logits.float(), labels[chosen], label_smoothing=SMOOTHING)
        loss.backward()
        adam.step()
        adam.zero_grad()
        schedule.step()
        total += loss.detach()
        if step % 50 == 0 or step == steps:
            mean, each = float(total) / (step - shown), (time.perf_counter() - began) / step
            print(f"step {step}/{steps}  loss {mean:.3f}  {each:.3f} s a step, {each * (steps - step):.0f} s to go", flush=True)
            shown, total = step, torch.zeros((), device=here)
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
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rate", type=float, default=1e-3, help="the highest learning rate (default: 1e-3; it grows with the batch)")
    parser.add_argument("--width", type=int, default=128, help="channels")
    parser.add_argument("--depth", type=int, default=6, help="layers")
    parser.add_argument("--heads", type=int, default=4, help="heads of a layer")
    parser.add_argument("--device", default="cpu", help="where to train: cpu or cuda")
    parser.add_argument("--out", type=Path, default=fashion.FOLDER, help="folder to write (default: the one in the package)")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    for name in ("epochs", "batch", "rate", "width", "depth", "heads"):
        if not getattr(given, name) > 0:
            parser.error(f"--{name} must be positive, got {getattr(given, name)}")
    if given.width % given.heads:
        parser.error(f"--heads must divide --width, got {given.heads} and {given.width}")
    if given.device != "cpu" and not torch.cuda.is_available():
        parser.error(f"--device {given.device}: torch finds no such device")
    data = given.data or (fashion.DEBIAN if fashion.DEBIAN.is_dir() else None)
    try:
        file, _ = fashion.fashion_files("train", data)
        images, labels = fashion.fashion_mnist("train", data)
        fashion.fashion_mnist("test", data)  # now, not after a quarter of an hour
    except DitherError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what CUDA's products need for it
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(given.seed)
    model = build(given.width, given.depth, given.heads).to(given.device)
    pixels = images.double() / 255
    print(f"{len(images)} images of {file} (mean {pixels.mean():.4f}, deviation {pixels.std():.4f}), {torch.get_num_threads()} threads", flush=True)
    began = time.perf_counter()
    steps = train(model, images, labels, given.epochs, given.batch, given.rate, given.seed)
    seconds = time.perf_counter() - began
    save(model.cpu(), given.out)
    sizes = {name: getattr(given, name) for name in ("epochs", "batch", "rate", "width", "depth", "heads", "device", "seed")}
    device = {} if given.device == "cpu" else {"device": torch.cuda.get_device_name()}
    record = {
        "command": " ".join(["python benchmarks/train_vit.py", *(f"--{name} {value}" for name, value in sizes.items())]),
        "data": {
            "name": "Fashion-MNIST", "licence": "MIT", "file": file.name, "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
            "images": len(images), "mean": round(float(pixels.mean()), 4), "deviation": round(float(pixels.std()), 4),
        },
        "recipe": {
            "optimizer": "AdamW", "learning_rate": given.rate, "betas": BETAS, "weight_decay": DECAY, "warm_up": WARM_UP, "schedule": "cosine",
            "batch": given.batch, "epochs": given.epochs, "steps": steps, "label_smoothing": SMOOTHING, "shift": SHIFT, "flip": True,
            "autocast": "bfloat16", "seed": given.seed,
        },
        "parameters": sum(p.numel() for p in model.parameters()),
        **measured(given.out, data),
        "seconds": round(seconds, 1),
        **device,
        **machine(),
    }  # fmt: skip
    write(given.out / "record.json", record)
    print(f"accuracy {record['accuracy']:.4f}, range ratios up to {record['largest_range_ratio']}, {seconds:.0f} s: {given.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
