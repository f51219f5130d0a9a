"""RepQ-ViT (arXiv 2212.08254): few-bit weights and activations of a vision transformer without training, by reparameterised norms and log-sqrt 2
attention."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from dither import models
from dither.claims.claim import Claim, Figures, Say, Test
from dither.formats import Int, Log
from dither.formats.quantiles import free_affine
from dither.models import fashion
from dither.quant import Accuracy, accuracy, quantize
from dither.quant.attention_inputs import watched
from dither.quant.inputs import InputQuant, round_rows
from dither.quant.recipes import RepQViT
from dither.quant.transforms.static_inputs import static

MODEL, CALIBRATION = fashion.ALIAS, 32
WIDTHS = (4, 6)
FORMATS = {"log sqrt 2": Log(4), "log 2": Log(4, root=1), "uniform": Int(4, scale="float32")}
JUDGED = 64  # test images on which attention's products are compared


def arms(bits: int) -> dict[str, RepQViT]:
    """The paper's method, with one thing after the other taken away."""

    def arm(**knobs: Any) -> RepQViT:
        return RepQViT(bits=bits, act_bits=bits, **knobs)

    return {
        "RTN per tensor": arm(search="minmax", reparameterise=False, softmax="uniform"),
        "percentile per tensor": arm(reparameterise=False, softmax="uniform"),
        "norms only": arm(softmax="uniform"),
        "log sqrt 2 only": arm(reparameterise=False),
        "norms + log 2": arm(softmax="log2"),
        "full": arm(),
        "weights only": RepQViT(bits=bits, act_bits=None),
    }


@lru_cache(maxsize=1)
def judged_images() -> tuple[Tensor, Tensor]:
    images, labels = fashion.fashion_mnist("test")
    return fashion.vit_inputs(images), labels


def data() -> str:
    file, _ = fashion.fashion_files("train")
    return f"Fashion-MNIST: {CALIBRATION} training images drawn from {file.name}, all {len(judged_images()[1])} test images"


@lru_cache(maxsize=1)
def float_accuracy() -> float:
    return accuracy(models.load(MODEL)[0], *judged_images()).accuracy


_seedless: dict[str, Accuracy] = {}


def measure(seed: int, say: Say) -> Figures:
    figures: Figures = {"float accuracy": float_accuracy()}
    for bits in WIDTHS:
        for name, recipe in arms(bits).items():
            key = f"W{bits}A{bits} {name} accuracy" if recipe.act_bits else f"W{bits} {name} accuracy"
            found = _seedless[key] if key in _seedless else accuracy(quantize(MODEL, recipe, samples=CALIBRATION, seed=seed).model, *judged_images())
            if recipe.act_bits is None:  # grids of weights do not see the images
                _seedless[key] = found
            figures[key] = found.accuracy
            say(f"  {key}: {100 * found.accuracy:.2f} %")
    return figures | products(seed)


@torch.no_grad()
def products(seed: int) -> Figures:
    """Of the float model's attention, all blocks: relative squared error of the probabilities A, and of A V, when A alone is rounded to 4 bits."""
    network = copy.deepcopy(models.load(MODEL)[0])
    source = models.open(MODEL)
    fitted: dict[str, list[InputQuant]] = {name: [] for name in FORMATS}

    def fit(module: nn.Module, operands: Mapping[str, Tensor]) -> None:
        for name, fmt in FORMATS.items():
            fitted[name].append(static(operands["probabilities"], fmt, "quantile", free_affine(4) if isinstance(fmt, Int) else None))

    with watched(network, fit):
        network(models.calibration_images(None, source, samples=CALIBRATION, seed=seed))
    lost = {(name, what): 0.0 for name in FORMATS for what in ("A", "A V")}
    norm = {"A": 0.0, "A V": 0.0}
    place = 0

    def judge(module: nn.Module, operands: Mapping[str, Tensor]) -> None:
        nonlocal place
        a, v = operands["probabilities"], operands["v"]
        exact = {"A": a, "A V": a @ v}
        for what, value in exact.items():
            norm[what] += float(value.square().sum())
        for name in FORMATS:
            quant = fitted[name][place]
            rounded = round_rows(a, quant.scheme, quant.params)
            for what, value in (("A", rounded), ("A V", rounded @ v)):
                lost[name, what] += float((value - exact[what]).square().sum())
        place += 1

    with watched(network, judge):
        network(judged_images()[0][:JUDGED])
    return {f"error of {what}, {name}": value / norm[what] for (name, what), value in lost.items()}


CLAIM = Claim(
    name="repq-vit",
    sentence="Norm outputs quantized by channel and run by layer, and attention quantized by powers of sqrt 2, make 4-bit vision transformers usable "
    "without any training.",
    source="Li et al., ICCV 2023, arXiv 2212.08254, table 3; repository zkkli/RepQ-ViT",
    work=f"vit-fashion (1.2 M weights, 6 blocks), weights, inputs and attention operands at {' and '.join(map(str, WIDTHS))} bits, "
    f"{CALIBRATION} calibration images, top-1 on 10,000 test images",
    data=data,
    measure=measure,
    paper={
        "ViT-S float": 0.8139,
        "ViT-S W4A4": 0.6505,
        "ViT-S W6A6": 0.8043,
        "DeiT-T float": 0.7221,
        "DeiT-T W4A4": 0.5743,
        "DeiT-T W6A6": 0.7076,
    },
    tests=(
        Test(
            "full is better than percentiles per tensor at W4A4",
            lambda f: f["W4A4 full accuracy"] > f["W4A4 percentile per tensor accuracy"],
        ),
        Test("full loses at most 1 point to float at W6A6", lambda f: f["W6A6 full accuracy"] >= f["float accuracy"] - 0.01),
        Test(
            "with norms reparameterised, log-sqrt 2 is at least as good as log 2 and that better than even steps, at W4A4",
            lambda f: f["W4A4 full accuracy"] >= f["W4A4 norms + log 2 accuracy"] > f["W4A4 norms only accuracy"],
        ),
        Test(
            "log-sqrt 2 has the least squared error of A V of the three 4-bit formats of A",
            lambda f: f["error of A V, log sqrt 2"] < min(f["error of A V, log 2"], f["error of A V, uniform"]),
        ),
        Test(
            "channels for norms and log-sqrt 2 for attention each help alone at W4A4",
            lambda f: min(f["W4A4 norms only accuracy"], f["W4A4 log sqrt 2 only accuracy"]) > f["W4A4 percentile per tensor accuracy"],
        ),
    ),
    caveat="A small network on small pictures: 50 tokens, so an attention row has little to lose; its norms' channel ranges differ less than those "
    "of ImageNet networks. Patch embedding and head stay float here (8 bits and 4 bits in the paper), and ranges are fitted on the float model's "
    "activations. Of the paper's baselines only those that are part of the method itself; OS+ is not among them.",
)
