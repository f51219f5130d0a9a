"""The protocol against figures of the field: float32 perplexity of the embedded model on WikiText-2, both ways of reading its test text."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from dither import models
from dither.quant.evaluate import open_model
from dither.quant.judge import perplexity

TEXT = Path(os.environ.get("DITHER_DATA", "")) / "text"


@pytest.mark.slow
@pytest.mark.skipif(not (TEXT / "wiki.test.raw").is_file(), reason="DITHER_DATA has no WikiText-2")
@pytest.mark.parametrize(
    ("file", "windows", "expected"),
    [("wiki.test.tokens", 4, 20.26), ("wiki.test.tokens", 16, 18.30), ("wiki.test.raw", 4, 24.15), ("wiki.test.raw", 16, 20.71)],
)
def test_float_perplexity(file: str, windows: int, expected: float) -> None:
    model, tokenizer = open_model("smollm2")
    text = models.read_text(TEXT / file)
    text = models.wikitext_join(text) if file.endswith(".raw") else text
    assert perplexity(model, text, tokenizer, windows=windows).perplexity == pytest.approx(expected, abs=0.02)
