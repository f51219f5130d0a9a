"""Pictures for models that take pictures: calibration images, and labelled ones to judge on.

What can be named: an ``.npz`` file with ``images`` (and ``labels``), an ``.npy`` file of images, or a folder with the IDX files of Fashion-MNIST.
Images of type float are taken as they are, ``[N, C, H, W]``, normalised already; uint8 ones, ``[N, H, W]`` or ``[N, H, W, C]``, must have the
model's size and are normalised as its ``preprocessor_config.json`` says:

    (pixel rescale_factor - image_mean) / image_std           a channel

The shipped model of images (and whatever was made from it) knows Fashion-MNIST, so for it nothing need be named.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dither.errors import CalibrationError, ModelError, UsageError
from dither.models import fashion
from dither.models.opening import open_source
from dither.models.source import Source

PREPROCESSOR = "preprocessor_config.json"


def takes_images(config: Any) -> bool:
    """Whether a transformers configuration is that of a model of pictures alone."""
    return hasattr(config, "image_size") and hasattr(config, "num_channels") and getattr(config, "vocab_size", None) is None


def calibration_images(path: str | Path | None, source: Source, *, samples: int, seed: int) -> Tensor:
    """``samples`` images (fewer where there are fewer) as the model takes them, float32 ``[N, C, H, W]``, drawn under ``seed``.

    ``path``: see above; None is the training images of Fashion-MNIST, for a model that knows them. Raises CalibrationError, UsageError.
    """
    if samples < 1:
        raise UsageError(f"samples: must be at least 1, not {samples}")
    if path is not None:
        images, _ = read_images(path)
    elif knows_fashion(source.config):
        images, _ = fashion.fashion_mnist("train")
    else:
        raise UsageError(f"calibration: {source.name} takes images; give normalised ones [N, C, H, W], or an .npz or .npy file of images")
    chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:samples]
    return normalised(images[chosen], source.config, preprocessor(source))


def labelled_images(path: str | Path | None, config: Any, settings: Mapping[str, Any], count: int | None = None) -> tuple[Tensor, Tensor]:
    """The first ``count`` images (None: all) as the model takes them, and their labels ``[N]`` int64. ``path`` None: Fashion-MNIST's test images,
    for a model that knows them. Raises CalibrationError, UsageError."""
    if path is None:
        if not knows_fashion(config):
            raise UsageError("images: name the labelled images to judge on: an .npz file with images and labels")
        images, labels = fashion.fashion_mnist("test")
    else:
        images, found = read_images(path, "test")
        if found is None:
            raise CalibrationError(f"{path}: has no labels to judge by; give an .npz file with images and labels")
        labels = found
    return normalised(images[:count], config, settings), labels[:count]


def knows_fashion(config: Any) -> bool:
    """Whether a model's classes are those of the shipped one, on pictures of that size."""
    try:
        shipped = json.loads((fashion.FOLDER / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    labels = getattr(config, "id2label", None) or {}
    return (
        {int(k): v for k, v in shipped["id2label"].items()} == {int(k): v for k, v in labels.items()}
        and getattr(config, "image_size", None) == shipped["image_size"]
        and getattr(config, "num_channels", None) == shipped["num_channels"]
    )


def preprocessor(source: Source | str) -> dict[str, Any]:
    """How the model (or what a user calls it) wants its pixels; empty where it does not say."""
    if isinstance(source, str) and Path(source).is_dir():
        path = Path(source) / PREPROCESSOR
        return _settings(source, path.read_bytes()) if path.is_file() else {}
    source = open_source(source) if isinstance(source, str) else source
    return next((_settings(source.name, content) for name, content in source.sidecars() if name == PREPROCESSOR), {})


def _settings(where: str, content: str | bytes) -> dict[str, Any]:
    try:
        found = json.loads(content)
        if not isinstance(found, dict):
            raise ValueError("it is no mapping")
        return found
    except ValueError as error:
        raise ModelError(f"{where}: {PREPROCESSOR} is damaged ({error}); get it again") from None


def read_images(path: str | Path, split: fashion.Split = "train") -> tuple[Tensor, Tensor | None]:
    """``(images, labels)`` as stored; labels None where there are none. ``split``: of Fashion-MNIST's files. Raises CalibrationError."""
    path = Path(path)
    if path.is_dir():
        return fashion.fashion_mnist(split, path)
    if path.suffix not in (".npz", ".npy"):
        raise CalibrationError(f"{path}: is no .npz or .npy file of images, and no folder of Fashion-MNIST")
    try:
        with np.load(path, allow_pickle=False) if path.suffix == ".npz" else _Single(path) as held:
            if "images" not in held:
                raise CalibrationError(f"{path}: has no array called images; it has {', '.join(held) or 'none'}")
            images = torch.from_numpy(np.ascontiguousarray(held["images"]))
            labels = torch.from_numpy(np.asarray(held["labels"]).astype(np.int64)) if "labels" in held else None
    except (OSError, ValueError, TypeError, zipfile.BadZipFile) as error:
        raise CalibrationError(f"{path}: cannot be read ({' '.join(str(error).split())[:120]})") from None
    if len(images) == 0 or (labels is not None and labels.shape != images.shape[:1]):
        raise CalibrationError(f"{path}: {len(images)} images with labels {None if labels is None else list(labels.shape)} make no data")
    return images, labels


class _Single(dict[str, Any]):
    """One array, seen as an archive of it."""

    def __init__(self, path: Path) -> None:
        super().__init__(images=np.load(path, allow_pickle=False))

    def __enter__(self) -> _Single:
        return self

    def __exit__(self, *error: object) -> None:
        return None


def normalised(images: Tensor, config: Any, settings: Mapping[str, Any]) -> Tensor:
    """Images as the model takes them, float32 ``[N, C, H, W]``. Raises CalibrationError where they are of another size, type or number of channels,
    hold NaN, or need a normalisation that the model does not tell."""
    if images.is_floating_point():
        if images.dim() != 4 or not bool(torch.isfinite(images).all()):
            raise CalibrationError(f"images: float ones must be finite [N, C, H, W], not {list(images.shape)}")
        found = images.float()
    else:
        found = _from_pixels(images, settings)
    size = getattr(config, "image_size", None)
    height, width = (size, size) if isinstance(size, int) else size if size is not None else found.shape[2:]
    channels = getattr(config, "num_channels", found.shape[1])
    if tuple(found.shape[1:]) != (channels, height, width):
        raise CalibrationError(f"images: are {list(found.shape[1:])}, but the model takes {[channels, height, width]}; resize them first")
    return found


def _from_pixels(images: Tensor, settings: Mapping[str, Any]) -> Tensor:
    if images.dtype != torch.uint8 or images.dim() not in (3, 4):
        raise CalibrationError(f"images: must be float [N, C, H, W] or uint8 [N, H, W] or [N, H, W, C], not {images.dtype} {list(images.shape)}")
    pixels = (images.unsqueeze(-1) if images.dim() == 3 else images).permute(0, 3, 1, 2).float()  # (N, C, H, W)
    mean, std = settings.get("image_mean"), settings.get("image_std")
    if mean is None or std is None:
        raise CalibrationError(f"images: the model has no {PREPROCESSOR} that says how to normalise pixels; give float images, normalised")
    if len(mean) != pixels.shape[1] or len(std) != pixels.shape[1]:
        raise CalibrationError(f"images: have {pixels.shape[1]} channels, but {PREPROCESSOR} normalises {len(mean)}")
    factor = float(settings.get("rescale_factor", 1 / 255))
    return ((pixels * factor - torch.tensor(mean).view(-1, 1, 1)) / torch.tensor(std).view(-1, 1, 1)).contiguous()
