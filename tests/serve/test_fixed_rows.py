"""Float layers always see eight rows, whoever asks how often."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from dither.serve.fixed_rows import fix_rows


@pytest.mark.parametrize("layer", [nn.Linear(24, 16), Conv1D(16, 24)], ids=["Linear", "Conv1D"])
def test_rows_are_filled_up_and_cut_off(layer: nn.Module) -> None:
    seen: list[tuple[int, ...]] = []
    plain = layer.forward
    layer.forward = lambda x: (seen.append(tuple(x.shape)), plain(x))[1]  # type: ignore[method-assign, assignment]
    x = torch.randn(8, 24)
    expected, handles = plain(x), [*fix_rows(layer), *fix_rows(layer)]
    assert len(handles) == 2
    for n in range(1, 9):
        assert torch.equal(layer(x[None, :n]), expected[None, :n]) and torch.equal(layer(x[:n]), expected[:n])
    assert {shape[-2] for shape in seen} == {8}
    seen.clear()
    for shape in ((9, 24), (2, 3, 24), (24,)):  # more rows, several sequences, and none
        assert torch.equal(layer(torch.ones(shape)), plain(torch.ones(shape)))
    assert seen == [(9, 24), (2, 3, 24), (24,)]
    for handle in handles:
        handle.remove()
    layer(x[:3])
    assert seen[-1] == (3, 24)
