"""The claim of RepQ-ViT, end to end on a tiny model that knows the shipped one's classes, with made-up pictures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from dither.claims import repq_vit
from dither.models import fashion


def test_it_measures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import ViTConfig, ViTForImageClassification

    config = json.loads((fashion.FOLDER / "config.json").read_text())
    config |= {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "patch_size": 7}
    torch.manual_seed(0)
    ViTForImageClassification(ViTConfig(**config)).save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_bytes((fashion.FOLDER / "preprocessor_config.json").read_bytes())
    images = torch.randint(0, 256, (64, 28, 28), dtype=torch.uint8)
    monkeypatch.setattr(fashion, "fashion_mnist", lambda split, folder=None: (images, torch.arange(64) % 10))
    monkeypatch.setattr(repq_vit, "MODEL", str(tmp_path))
    monkeypatch.setattr(repq_vit, "_seedless", {})
    repq_vit.judged_images.cache_clear()
    repq_vit.float_accuracy.cache_clear()
    try:
        figures = repq_vit.measure(0, lambda line: None)
    finally:
        repq_vit.judged_images.cache_clear()
        repq_vit.float_accuracy.cache_clear()
    assert len(figures) == 1 + 7 * 2 + 6 and all(0 <= figures[k] <= 1 for k in figures if k.endswith("accuracy"))
    assert all(0 < figures[f"error of {what}, {name}"] < 1 for what in ("A", "A V") for name in repq_vit.FORMATS)
    assert [bool(test.passes(figures)) for test in repq_vit.CLAIM.tests]
