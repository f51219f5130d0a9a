"""The vision model that dither ships, and the reader of the pictures that it knows."""

from __future__ import annotations

import gzip
import importlib.util
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dither import models
from dither.errors import CalibrationError, ModelError
from dither.models import fashion
from dither.models.fashion import fashion_mnist, vit_inputs

ROOT = Path(__file__).resolve().parents[2]
TRAIN, TEST, PART = "train-images-idx3-ubyte.gz", "t10k-images-idx3-ubyte.gz", "train10k-images-idx3-ubyte.gz"
TRAIN_LABELS, TEST_LABELS = "train-labels-idx1-ubyte.gz", "t10k-labels-idx1-ubyte.gz"


def images(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(256, (count, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def image_file(pixels: torch.Tensor) -> bytes:
    return struct.pack(">4I", 0x803, len(pixels), 28, 28) + pixels.numpy().tobytes()


def label_file(labels: list[int]) -> bytes:
    return struct.pack(">2I", 0x801, len(labels)) + bytes(labels)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twelve training and five test images, as Fashion-MNIST's files hold them."""
    content = {
        TRAIN: image_file(images(12)), TRAIN_LABELS: label_file([*range(10), 9, 0]),
        TEST: image_file(images(5, seed=1)), TEST_LABELS: label_file([4, 3, 2, 1, 0]),
    }  # fmt: skip
    where = tmp_path / "fashion-mnist"
    where.mkdir()
    for name, raw in content.items():
        (where / name).write_bytes(gzip.compress(raw))
    return where


def message(folder: Path | None, split: Any = "train") -> str:
    with pytest.raises(CalibrationError) as caught:
        fashion_mnist(split, folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# -- the reader --------------------------------------------------------------------------------------------------------------


def test_both_splits_are_read_as_stored(folder: Path) -> None:
    pixels, labels = fashion_mnist("train", folder)
    assert torch.equal(pixels, images(12)) and pixels.dtype == torch.uint8
    assert labels.tolist() == [*range(10), 9, 0] and labels.dtype == torch.int64
    pixels, labels = fashion_mnist("test", str(folder))
    assert torch.equal(pixels, images(5, seed=1)) and labels.tolist() == [4, 3, 2, 1, 0]
    pixels.zero_()  # the memory is the caller's
    assert torch.equal(fashion_mnist("test", folder)[0], images(5, seed=1))


def test_where_the_files_are_looked_for(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fashion, "DEBIAN", folder.parent / "nothing")
    monkeypatch.delenv("DITHER_DATA", raising=False)
    assert "apt-get install dataset-fashion-mnist" in message(None) and TRAIN in message(None)
    monkeypatch.setenv("DITHER_DATA", str(folder.parent))
    assert len(fashion_mnist("train")[0]) == 12
    monkeypatch.setenv("DITHER_DATA", str(folder.parent / "elsewhere"))
    assert "elsewhere/fashion-mnist or" in message(None, "test")
    monkeypatch.setattr(fashion, "DEBIAN", folder)
    assert len(fashion_mnist("test")[0]) == 5
    assert str(folder.parent) in message(folder.parent)  # a folder that is given is the only one


def test_a_part_of_the_training_images_goes_with_all_labels(folder: Path) -> None:
    (folder / PART).write_bytes(gzip.compress(image_file(images(12)[:4])))
    assert len(fashion_mnist("train", folder)[0]) == 12  # all, where they are there
    (folder / TRAIN).unlink()
    pixels, labels = fashion_mnist("train", folder)
    assert torch.equal(pixels, images(12)[:4]) and labels.tolist() == [0, 1, 2, 3]


def test_no_other_split() -> None:
    with pytest.raises(ValueError, match="split must be 'train' or 'test', got 'valid'"):
        fashion_mnist("valid")  # type: ignore[arg-type]


def lie(position: int, value: int) -> Callable[[bytes], bytes]:
    """Overwrite a word of the header."""
    return lambda raw: raw[: 4 * position] + struct.pack(">I", value) + raw[4 * position + 4 :]


@pytest.mark.parametrize(
    ("file", "change", "says"),
    [
        (TRAIN, lambda raw: b"", "ends after 0 bytes, inside its header"),
        (TRAIN, lambda raw: raw[:15], "ends after 15 bytes, inside its header"),
        (TRAIN, lambda raw: raw[:16], "says it has 9408 bytes of 12 items, but has only 0"),
        (TRAIN, lambda raw: raw[:-1], "says it has 9408 bytes of 12 items, but has only 9407"),
        (TRAIN, lambda raw: raw + b"\0", "but has more"),
        (TRAIN, lie(0, 0x801), "has the magic number 0x00000801 instead of 0x00000803"),
        (TRAIN, lie(0, 0x0D03), "magic number 0x00000d03"),
        (TRAIN, lie(1, 13), "has only 9408"),
        (TRAIN, lie(1, 11), "but has more"),
        (TRAIN, lie(1, 0), "says it has 0 items"),
        (TRAIN, lie(1, 0xFFFFFFFF), "says it has 4294967295 items, but 1 to 60000 are possible"),
        (TRAIN, lie(2, 0), "0 x 28 instead of 28 x 28"),
        (TRAIN, lie(3, 0xFFFFFFFF), "28 x 4294967295 instead of 28 x 28"),
        (TRAIN_LABELS, lie(0, 0x803), "magic number 0x00000803 instead of 0x00000801"),
        (TRAIN_LABELS, lambda raw: raw[:-3], "says it has 12 bytes of 12 items, but has only 9"),
        (TRAIN_LABELS, lambda raw: raw[:-1] + b"\x0a", "has the label 10, beyond 9"),
        (TRAIN_LABELS, lambda raw: label_file([1] * 11), "has 11 labels for the 12 images"),
        (TRAIN_LABELS, lambda raw: label_file([1] * 13), "has 13 labels for the 12 images"),
    ],
)
def test_damaged_content(folder: Path, file: str, change: Callable[[bytes], bytes], says: str) -> None:
    path = folder / file
    path.write_bytes(gzip.compress(change(gzip.decompress(path.read_bytes()))))
    assert says in message(folder) and str(path) in message(folder)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda raw: b"", "ends after 0 bytes"),
        (lambda raw: raw[:5], "is cut off"),
        (lambda raw: raw[: len(raw) // 2], "is cut off"),
        (lambda raw: raw[:-8], "is cut off"),
        (lambda raw: raw[:-8] + b"\0" + raw[-7:], "cannot be unpacked (CRC check failed"),
        (lambda raw: raw[:10] + b"\xff" * 40, "cannot be unpacked"),
        (gzip.decompress, "cannot be unpacked (Not a gzipped file"),
    ],
)
def test_damaged_compression(folder: Path, change: Callable[[bytes], bytes], says: str) -> None:
    path = folder / TRAIN
    path.write_bytes(change(path.read_bytes()))
    assert says in message(folder) and str(path) in message(folder)


def test_a_bomb_is_not_unpacked(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two hundred MB of zeros behind a header of twelve images: one byte too many is read, not all of them."""
    (folder / TRAIN).write_bytes(gzip.compress(struct.pack(">4I", 0x803, 12, 28, 28)) + gzip.compress(bytes(200_000_000), 1))
    given, real = [], gzip.GzipFile.read

    def read(self: gzip.GzipFile, size: int | None = -1) -> bytes:
        got = real(self, size)
        given.append(len(got))
        return got

    monkeypatch.setattr(gzip.GzipFile, "read", read)
    assert "but has more" in message(folder)
    assert sum(given) == 16 + 12 * 784 + 1


def test_missing_labels_and_folders_in_place_of_files(folder: Path) -> None:
    (folder / TRAIN_LABELS).unlink()
    assert f"{folder / TRAIN_LABELS}: cannot be read (No such file or directory)" in message(folder)
    (folder / TRAIN_LABELS).mkdir()
    assert "cannot be read (Is a directory)" in message(folder)


def test_inputs_are_normalised() -> None:
    pixels = images(3)
    inputs = vit_inputs(pixels)
    assert inputs.shape == (3, 1, 28, 28) and inputs.dtype == torch.float32
    assert torch.allclose(inputs[:, 0] * fashion.STD + fashion.MEAN, pixels / 255, atol=1e-6)
    for wrong in (pixels.float(), pixels[0], pixels[:, :27], pixels[:, None]):
        with pytest.raises(ValueError, match=r"images must be uint8 \[N, 28, 28\], got"):
            vit_inputs(wrong)


# -- the model ---------------------------------------------------------------------------------------------------------------


def record() -> dict[str, Any]:
    kept: dict[str, Any] = json.loads((fashion.FOLDER / "record.json").read_text())
    return kept


def test_the_alias_opens() -> None:
    source = models.open("vit-fashion")
    assert source.name == "vit-fashion" and source.dtype == torch.float16 and not source.notes
    assert sum(torch.Size(source.shape(n)).numel() for n in source.names()) == record()["parameters"]
    model, tokenizer = models.load("vit-fashion")
    assert tokenizer is None and not model.training
    assert all(p.dtype == torch.float32 for p in model.parameters())
    with torch.no_grad():
        assert model(vit_inputs(images(2))).logits.shape == (2, 10)
    with pytest.raises(ModelError, match="did you mean vit-fashion"):
        models.open("vit-fashon")


def test_the_package_holds_the_model_and_its_facts() -> None:
    assert (fashion.FOLDER / "model.safetensors").stat().st_size < 5_000_000
    preprocessor = json.loads((fashion.FOLDER / "preprocessor_config.json").read_text())
    assert (preprocessor["image_mean"], preprocessor["image_std"]) == ([fashion.MEAN], [fashion.STD])
    data = record()["data"]
    assert (data["mean"], data["deviation"]) == (fashion.MEAN, fashion.STD) and data["licence"] == "MIT"
    model, _ = models.load("vit-fashion")
    assert set(record()["range_ratio"]) == {n for n, m in model.named_modules() if isinstance(m, nn.LayerNorm)}


def test_the_model_is_as_good_as_its_record_says() -> None:
    try:
        pixels, labels = fashion_mnist("test")
    except CalibrationError as error:
        pytest.skip(str(error))
    model, _ = models.load("vit-fashion")
    with torch.no_grad():
        found = torch.cat([model(vit_inputs(some)).logits.argmax(-1) for some in pixels[:1000].split(250)])
    assert float((found == labels[:1000]).double().mean()) >= record()["accuracy"] - 0.03


# -- the command that makes it -----------------------------------------------------------------------------------------------


def command() -> Any:
    spec = importlib.util.spec_from_file_location("train_vit", ROOT / "benchmarks" / "train_vit.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_training_twice_gives_the_same_files(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train_vit = command()
    try:
        for name in ("a", "b"):
            torch.rand(7)  # whatever was drawn before
            assert train_vit.main(["--data", str(folder), "--epochs", "1", "--out", str(folder / name)]) == 0
    finally:
        torch.use_deterministic_algorithms(False)
    for file in ("config.json", "model.safetensors", "preprocessor_config.json"):
        assert (folder / "a" / file).read_bytes() == (folder / "b" / file).read_bytes(), file
    kept = json.loads((folder / "a" / "record.json").read_text())
    assert kept["data"]["images"] == 12 and kept["recipe"]["steps"] == 1 and len(kept["range_ratio"]) == 13
    assert set(kept) == set(record())
    assert "step 1/1" in capsys.readouterr().out


def test_training_says_in_one_line_what_is_missing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / TEST).unlink()
    assert command().main(["--data", str(folder), "--out", str(folder / "a")]) == 1
    said = capsys.readouterr().err
    assert TEST in said and said.count("\n") == 1 and not (folder / "a").exists()


def test_augmentation_moves_and_mirrors_only() -> None:
    """Every image comes out as one of its fifty mirrored and shifted versions."""
    train_vit = command()
    pixels = images(20)
    moved = train_vit.augmented(pixels, torch.Generator().manual_seed(0))
    padded = nn.functional.pad(pixels, (2,) * 4)
    for before, after in zip(padded, moved, strict=True):
        versions = [before[y : y + 28, x : x + 28] for y in range(5) for x in range(5)]
        assert any(torch.equal(after, v) or torch.equal(after, v.flip(1)) for v in versions)


def test_decay_is_for_matrices_only() -> None:
    train_vit = command()
    model = train_vit.build()
    decayed, others = train_vit.optimizer(model).param_groups
    assert decayed["weight_decay"] == 0.05 and others["weight_decay"] == 0
    names = {id(p): n for n, p in model.named_parameters()}
    assert len(decayed["params"]) == 6 * 6 + 2  # six linear maps a layer, patches, classifier
    assert all(names[id(p)].endswith("weight") and "norm" not in names[id(p)] for p in decayed["params"])
    assert len(decayed["params"]) + len(others["params"]) == len(names)
