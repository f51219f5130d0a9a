"""quantize and eval on a model of images, as scripts call them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import dither
import tiny_models
from dither.cli.main import main


def answer(capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 0) -> Any:
    capsys.readouterr()
    with pytest.raises(SystemExit) as done:
        main([*map(str, arguments)])
    printed = capsys.readouterr()
    assert done.value.code == code, printed.err
    return json.loads(printed.out.splitlines()[-1]) if code == 0 else printed.err


def test_quantize_and_eval(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    model, _ = tiny_models.build("vit")
    model.save_pretrained(tmp_path / "model")
    x = torch.randn(40, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        labels = model(x).logits.argmax(-1)
    np.savez(tmp_path / "data.npz", images=x.numpy(), labels=labels.numpy())
    data, out = tmp_path / "data.npz", tmp_path / "out"
    quantize = ["quantize", tmp_path / "model", "--method", "repq-vit", "--bits", 6, "--act-bits", 6, "--calibration", data, "-o", out, "--json"]
    made = answer(capsys, *quantize)
    assert made["method"] == "repq-vit" and not any("samples only" in note for note in made["notes"])
    scheme = json.loads((out / "config.json").read_text())["quantization_config"]["schemes"][0]
    assert scheme["blocks"]["kind"] == "channel" and scheme["format"]["bits"] == 6
    held = dither.quantize(tmp_path / "model", dither.recipes.RepQViT(bits=6, act_bits=6), data, tmp_path / "again")
    assert (held.out / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()  # type: ignore[operator]
    found = answer(capsys, "eval", out, "--images", data, "--json")
    assert set(found) == {"accuracy", "images", "seconds"}
    assert found["images"] == 40 and found["accuracy"] == float(dither.accuracy(held, x, labels)) > 0.5
    few = answer(capsys, "eval", tmp_path / "model", "--images", data, "--count", 7, "--json")
    assert few["accuracy"] == 1.0 and few["images"] == 7
    assert "name the labelled images" in answer(capsys, "eval", out, code=2)
    assert "takes images" in answer(capsys, "quantize", tmp_path / "model", "--method", "repq-vit", "-o", tmp_path / "none", code=2)


def test_the_knobs_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    knobs = answer(capsys, "methods", "repq-vit", "--json")["repq-vit"]["knobs"]
    assert knobs["softmax"]["default"] == "log_sqrt2" and knobs["act_bits"]["default"] == 4 and knobs["group"]["default"] is None
