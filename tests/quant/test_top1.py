"""Accuracy against counting by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import dither
import tiny_models


def test_it_counts() -> None:
    model, _ = tiny_models.build("vit")
    x = torch.randn(23, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = model(x).logits
    labels = torch.arange(23) % 5
    expected = sum(int(row.argmax()) == int(label) for row, label in zip(logits, labels, strict=True)) / 23
    model.train()
    calls: list[tuple[int, int]] = []
    found = dither.accuracy(model, x, labels, batch=10, progress=lambda done, total: calls.append((done, total)))
    assert float(found) == expected and found.images == 23 and calls == [(10, 23), (20, 23), (23, 23)]
    assert model.training
    assert float(dither.accuracy(model, x, logits.argmax(-1))) == 1


def test_modules_of_ones_own_and_results() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 4))
    x = torch.randn(8, 3, 2, 2)
    assert float(dither.accuracy(net, x, net(x).argmax(-1), batch=3)) == 1
    assert float(dither.accuracy(dither.quantize(net, dither.recipes.RTN(weights=dither.formats.Int(8) @ dither.formats.channel(), group=None,
                 overrides={"1": dither.formats.Int(8) @ dither.formats.channel()})), x, net(x).argmax(-1))) >= 0.75


def test_wrong_calls() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 4))
    x = torch.randn(8, 3, 2, 2)
    good = torch.zeros(8, dtype=torch.int64)
    for images, labels, options in (
        (x, good[:5], {}),
        (x[:0], good[:0], {}),
        (x, good.float(), {}),
        (x, good + 4, {}),
        (x, good - 1, {}),
        (x, good, {"batch": 0}),
        (torch.full_like(x, torch.nan), good, {}),
    ):
        with pytest.raises(ValueError, match=r"labels|batch|finite"):
            dither.accuracy(net, images, labels, **options)  # type: ignore[arg-type]
