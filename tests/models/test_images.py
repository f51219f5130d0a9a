"""Images from files, and as models take them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from dither.errors import CalibrationError, UsageError
from dither.models import fashion, images

CONFIG = SimpleNamespace(image_size=4, num_channels=3)
SETTINGS = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.25, 0.125], "rescale_factor": 1 / 255}


class Given:
    """What `calibration_images` asks of a source."""

    name, config = "given", CONFIG

    def sidecars(self) -> Any:
        import json

        yield images.PREPROCESSOR, json.dumps(SETTINGS)


def test_pixels_are_normalised_channel_by_channel() -> None:
    pixels = torch.randint(0, 256, (5, 4, 4, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    found = images.normalised(pixels, CONFIG, SETTINGS)
    assert found.shape == (5, 3, 4, 4)
    for c in range(3):
        expected = (pixels[..., c].double() / 255 - SETTINGS["image_mean"][c]) / SETTINGS["image_std"][c]  # type: ignore[index]
        assert torch.allclose(found[:, c].double(), expected, atol=1e-5)


def test_the_shipped_models_pixels() -> None:
    pixels = torch.randint(0, 256, (3, 28, 28), dtype=torch.uint8)
    settings = {"image_mean": [fashion.MEAN], "image_std": [fashion.STD], "rescale_factor": 1 / 255}
    assert torch.allclose(images.normalised(pixels, SimpleNamespace(image_size=28, num_channels=1), settings), fashion.vit_inputs(pixels), atol=1e-5)


def test_files(tmp_path: Path) -> None:
    x, y = np.random.default_rng(0).normal(size=(40, 3, 4, 4)).astype(np.float32), np.arange(40) % 7
    np.savez(tmp_path / "both.npz", images=x, labels=y)
    np.save(tmp_path / "one.npy", x)
    drawn = [images.calibration_images(tmp_path / name, Given(), samples=9, seed=1) for name in ("both.npz", "one.npy")]  # type: ignore[arg-type]
    assert torch.equal(*drawn) and drawn[0].shape == (9, 3, 4, 4)
    every = {row.numpy().tobytes() for row in torch.from_numpy(x)}
    assert len({row.numpy().tobytes() for row in drawn[0]} & every) == 9
    other = images.calibration_images(tmp_path / "one.npy", Given(), samples=9, seed=2)  # type: ignore[arg-type]
    assert not torch.equal(other, drawn[0])
    assert len(images.calibration_images(tmp_path / "one.npy", Given(), samples=99, seed=0)) == 40  # type: ignore[arg-type]
    pixels, labels = images.labelled_images(tmp_path / "both.npz", CONFIG, {}, 10)
    assert torch.equal(pixels, torch.from_numpy(x[:10])) and labels.tolist() == y[:10].tolist()
    with pytest.raises(CalibrationError, match="no labels"):
        images.labelled_images(tmp_path / "one.npy", CONFIG, {})


def test_wrong_files(tmp_path: Path) -> None:
    (tmp_path / "cut.npz").write_bytes(b"PK\x03\x04 nothing")
    (tmp_path / "text.txt").write_text("no images")
    np.savez(tmp_path / "other.npz", pictures=np.zeros((2, 3, 4, 4)))
    np.savez(tmp_path / "empty.npz", images=np.zeros((0, 3, 4, 4)))
    np.savez(tmp_path / "labels.npz", images=np.zeros((2, 3, 4, 4)), labels=np.zeros(3))
    np.save(tmp_path / "object.npy", np.array([{}], dtype=object))
    for name in ("cut.npz", "text.txt", "other.npz", "empty.npz", "labels.npz", "object.npy", "nowhere.npz"):
        with pytest.raises(CalibrationError, match=name):
            images.read_images(tmp_path / name)


def test_images_that_do_not_fit() -> None:
    for wrong, why in (
        (torch.zeros(2, 3, 5, 5), "resize"),
        (torch.zeros(2, 1, 4, 4), "takes"),
        (torch.full((2, 3, 4, 4), torch.nan), "finite"),
        (torch.zeros(3, 4, 4), "finite"),
        (torch.zeros(2, 4, 4, 3, dtype=torch.int64), "uint8"),
        (torch.zeros(2, 4, 4, dtype=torch.uint8), "channels"),
    ):
        with pytest.raises(CalibrationError, match=why):
            images.normalised(wrong, CONFIG, SETTINGS)
    with pytest.raises(CalibrationError, match="how to normalise"):
        images.normalised(torch.zeros(2, 4, 4, 3, dtype=torch.uint8), CONFIG, {})
    with pytest.raises(UsageError, match="takes images"):
        images.calibration_images(None, Given(), samples=4, seed=0)  # type: ignore[arg-type]
