"""Perplexity, against a computation that takes no short cuts."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dither
import tiny_folder
import tiny_models
from dither.errors import CalibrationError, UsageError
from dither.quant import judge
from dither.quant.judge import perplexity

IDS = torch.randint(3, tiny_models.VOCABULARY, (200,), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def naive(model: nn.Module, ids: Tensor, length: int) -> float:
    """All logits of a window, softmax in float64, a sum in Python."""
    total, count = 0.0, 0
    for window in ids[: len(ids) // length * length].view(-1, length):
        p = model(input_ids=window[None]).logits[0].double().log_softmax(-1)
        for t in range(1, length):
            total -= float(p[t - 1, window[t]])
            count += 1
    return math.exp(total / count)


@pytest.mark.parametrize("name", tiny_models.LANGUAGE)
def test_every_language_model(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judge, "_ROWS", 7)  # so that a window takes several turns, the last one short
    model, _ = tiny_models.build(name)
    for parameter in model.parameters():
        parameter.data *= 3  # away from the uniform distribution that small random weights give
    result = perplexity(model, IDS, length=20)
    assert result.perplexity == pytest.approx(naive(model, IDS, 20), rel=1e-5)
    assert (result.windows, result.tokens) == (10, 190) and float(result) == result.perplexity


def rows_of_logits(model: nn.Module) -> list[int]:
    """How many rows the head makes at a time, from now on."""
    seen: list[int] = []
    model.get_output_embeddings().register_forward_hook(
        lambda m, a, out: seen.append(out.reshape(-1, out.shape[-1]).shape[0])
    )
    return seen


def test_logits_are_made_a_few_rows_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judge, "_ROWS", 8)
    model, _ = tiny_models.build("llama")
    seen = rows_of_logits(model)
    perplexity(model, IDS, length=50, windows=2)
    assert (
        max(seen) == 8 and sum(seen) == 2 * 49 + 2 * 4
    )  # and the two readings of four tokens that prove the head plain


@pytest.mark.parametrize("name", ["gemma2", "granite"])
def test_softcaps_and_scales_of_logits_are_not_left_out(name: str) -> None:
    model, _ = tiny_models.build(name)
    model.get_output_embeddings().weight.data *= 200
    seen = rows_of_logits(model)
    value = perplexity(model, IDS, length=20, windows=2).perplexity
    assert value == pytest.approx(naive(model, IDS[:40], 20), rel=1e-5) and 20 in seen
    if name == "gemma2":
        model.config.final_logit_softcapping = None
    else:
        model.config.logits_scaling = 1.0
    assert perplexity(model, IDS, length=20, windows=2).perplexity != pytest.approx(value, rel=1e-2)


def test_nothing_is_remembered_between_models() -> None:
    """One address can serve many models: what was proved of one says nothing of the next."""
    values = []
    for name in ("llama", "gemma2", "granite") * 3:
        model, _ = tiny_models.build(name)
        values.append(perplexity(model, IDS, length=20, windows=1).perplexity - naive(model, IDS[:20], 20))
        del model
    assert max(map(abs, values)) < 1e-2


def test_first_windows_only_and_the_rest_of_the_text_is_left_out() -> None:
    model, _ = tiny_models.build("llama")
    assert perplexity(model, IDS, length=30).windows == 6
    steps: list[tuple[int, int]] = []
    some = perplexity(model, IDS, length=30, windows=2, progress=lambda done, total: steps.append((done, total)))
    assert some.perplexity == pytest.approx(naive(model, IDS[:60], 30), rel=1e-5) and steps == [(1, 2), (2, 2)]
    assert perplexity(model, IDS[None].int(), length=30, windows=2).perplexity == some.perplexity


def test_text_is_tokenized_once(tmp_path: Path) -> None:
    model, tokenizer = tiny_folder.save(tmp_path), tiny_folder.tokenizer()
    text = tiny_folder.text()
    ids = torch.tensor(tokenizer(text)["input_ids"])
    expected = perplexity(model, ids, length=40, windows=3).perplexity
    assert perplexity(model, text, tokenizer, length=40, windows=3).perplexity == expected
    (tmp_path / "text.txt").write_text(text)
    assert perplexity(model, tmp_path / "text.txt", tokenizer, length=40, windows=3).perplexity == expected


def test_a_result_is_judged_as_its_model(tmp_path: Path) -> None:
    model, _ = tiny_models.build("llama")
    result = dither.quantize(model, dither.recipes.RTN(bits=4, group=16))
    value = dither.perplexity(result, IDS, length=20).perplexity
    assert value == pytest.approx(naive(result.model, IDS, 20), rel=1e-5)


def test_dropout_is_off_and_modes_come_back() -> None:
    model, _ = tiny_models.build("gpt2")
    expected = perplexity(model, IDS, length=20).perplexity
    model.train()
    model.transformer.h[0].eval()
    assert perplexity(model, IDS, length=20).perplexity == expected
    assert model.training and model.transformer.h[1].training and not model.transformer.h[0].training


WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"windows": 0}, ValueError, "windows: must be at least 1, not 0"),
    ({"length": 1}, ValueError, "length: .* not 1"),
    ({"length": 65}, UsageError, "64 positions"),
    ({"length": 60, "windows": 4}, CalibrationError, "has 200 tokens, but 4 windows of 60"),
    ({"text": IDS[:5]}, CalibrationError, "has 5 tokens, but 1 windows of 20"),
    ({"text": IDS[:0]}, CalibrationError, "has 0 tokens"),
    ({"text": IDS.float()}, ValueError, "integers"),
    ({"text": IDS - 90}, ValueError, "model knows 0 to 95"),
    ({"text": IDS + 90}, ValueError, "model knows 0 to 95"),
    ({"text": "words"}, ValueError, "tokenizer"),
    ({"text": Path("nowhere.txt"), "tokenizer": tiny_folder.tokenizer()}, Exception, "nowhere.txt"),
]


@pytest.mark.parametrize(("options", "kind", "message"), WRONG)
def test_wrong_calls(options: dict[str, Any], kind: type[Exception], message: str) -> None:
    model, _ = tiny_models.build("llama")
    with pytest.raises(kind, match=message):
        perplexity(model, **({"text": IDS, "length": 20} | options))


def test_output_that_is_not_finite_is_named() -> None:
    model, _ = tiny_models.build("llama")
    model.lm_head.weight.data[5] = float("nan")
    with pytest.raises(ValueError, match="not finite in window 0"):
        perplexity(model, IDS, length=20)


def test_hopeless_models_have_infinite_perplexity() -> None:
    model, _ = tiny_models.build("llama")
    model.lm_head.weight.data *= 1e6
    assert perplexity(model, IDS, length=20).perplexity == math.inf
