"""``vit-fashion``: a small trained vision model that dither ships, and the pictures that it knows, Fashion-MNIST.

The model lies in ``vit_fashion/`` beside this file: 1.2 million weights in float16, made by ``benchmarks/train_vit.py``; its ``record.json`` says
on what, and how good it is. The pictures (MIT licence) are not shipped: they are read from a folder of IDX files, such as the one of Debian's
package dataset-fashion-mnist.
"""

from __future__ import annotations

import gzip
import os
import struct
import zlib
from math import prod
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from dither.errors import CalibrationError

ALIAS = "vit-fashion"
FOLDER = Path(__file__).parent / "vit_fashion"
DEBIAN = Path("/usr/share/datasets/fashion-mnist")

SIDE, CLASSES, MOST = 28, 10, 60_000  # pixels, kinds of clothing, images of the larger split
MEAN, STD = 0.2860, 0.3530  # of the 60,000 training images, pixels in [0, 1]; the model's preprocessor_config.json has them too

Split = Literal["train", "test"]

# Images and labels of each split, best first. Of the second training file only the beginning is there, but all labels are.
_FILES = {
    "train": [
        ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"),
        ("train10k-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"),
    ],
    "test": [("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz")],
}
_IMAGES, _LABELS = 0x803, 0x801  # IDX: unsigned bytes in three dimensions, in one


def fashion_mnist(split: Split, folder: str | Path | None = None) -> tuple[Tensor, Tensor]:
    """``(images, labels)``: uint8 ``[N, 28, 28]`` and int64 ``[N]``, in the order of the files.

    ``folder``: where the gzipped IDX files lie; None: ``$DITHER_DATA/fashion-mnist``, else Debian's folder. Training images may be the first
    10,000 (``train10k-...``) where the 60,000 are not there. Raises CalibrationError (missing or damaged files).
    """
    images_file, labels_file = fashion_files(split, folder)
    images = _read(images_file, _IMAGES, (SIDE, SIDE))
    labels = _read(labels_file, _LABELS, ()).long()
    if int(labels.max()) >= CLASSES:
        raise _damaged(labels_file, f"has the label {int(labels.max())}, beyond {CLASSES - 1}")
    cut = images_file.name.startswith("train10k")
    if len(labels) < len(images) or (len(labels) > len(images) and not cut):
        raise _damaged(labels_file, f"has {len(labels)} labels for the {len(images)} images of {images_file.name}")
    return images, labels[: len(images)]


def fashion_files(split: Split, folder: str | Path | None = None) -> tuple[Path, Path]:
    """The files that `fashion_mnist` reads: images, labels. Raises CalibrationError where there are none."""
    if split not in _FILES:
        raise ValueError(f"split must be 'train' or 'test', got {split!r}")
    data = os.environ.get("DITHER_DATA")
    places = [Path(folder)] if folder is not None else [*([Path(data) / "fashion-mnist"] if data else []), DEBIAN]
    for place in places:
        for images, labels in _FILES[split]:
            if (place / images).is_file():
                return place / images, place / labels
    raise CalibrationError(
        f"Fashion-MNIST: {_FILES[split][0][0]} is not in {' or '.join(map(str, places))}; "
        "run: apt-get install dataset-fashion-mnist, or give the folder that has it"
    )


def vit_inputs(images: Tensor) -> Tensor:
    """Images, uint8 ``[N, 28, 28]``, as the model takes them: float32 ``[N, 1, 28, 28]``, normalised."""
    if images.dtype != torch.uint8 or images.dim() != 3 or images.shape[1:] != (SIDE, SIDE):
        raise ValueError(f"images must be uint8 [N, {SIDE}, {SIDE}], got {images.dtype} {list(images.shape)}")
    return ((images.float() / 255 - MEAN) / STD).unsqueeze(1)


def _read(path: Path, magic: int, shape: tuple[int, ...]) -> Tensor:
    """The items of a gzipped IDX file, uint8 ``[N, *shape]``; never more bytes are unpacked than a true file has."""
    header = struct.Struct(f">{2 + len(shape)}I")  # magic, number of items, shape of one
    try:
        with gzip.open(path) as file:
            head = file.read(header.size)
            if len(head) < header.size:
                raise _damaged(path, f"ends after {len(head)} bytes, inside its header")
            found, count, *item = header.unpack(head)
            if found != magic:
                raise _damaged(path, f"has the magic number {found:#010x} instead of {magic:#010x}")
            if tuple(item) != shape:
                raise _damaged(path, f"says its images are {' x '.join(map(str, item))} instead of {SIDE} x {SIDE}")
            if not 1 <= count <= MOST:
                raise _damaged(path, f"says it has {count} items, but 1 to {MOST} are possible")
            size = count * prod(shape)
            content = file.read(size + 1)  # one more, so that the end of the file is met and its checksum looked at
    except EOFError:
        raise _damaged(path, "is cut off") from None
    except (gzip.BadGzipFile, zlib.error) as error:
        raise _damaged(path, f"cannot be unpacked ({error})") from None
    except OSError as error:
        raise CalibrationError(f"{path}: cannot be read ({error.strerror or error})") from None
    if len(content) != size:
        has = f"only {len(content)}" if len(content) < size else "more"
        raise _damaged(path, f"says it has {size} bytes of {count} items, but has {has}")
    return torch.frombuffer(bytearray(content), dtype=torch.uint8).reshape(count, *shape)


def _damaged(path: Path, what: str) -> CalibrationError:
    return CalibrationError(f"{path}: {what}; copy or install Fashion-MNIST again")
