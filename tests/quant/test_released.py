"""What a block needs is gone when the block is done, without the help of Python's cycle collector: peak memory depends on it."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch

import dither
import tiny_models
from dither.quant import block
from dither.quant.parts import BlockView
from dither.quant.recipes import build

TOKENS = torch.randint(3, tiny_models.VOCABULARY, (4, 24), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("method", ["gptq", "awq", "awq+gptq", "flexround"])
def test_views_of_blocks_die_with_their_blocks(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    views: list[weakref.ref[BlockView]] = []

    class Watched(BlockView):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            assert all(view() is None for view in views)  # those of earlier blocks
            views.append(weakref.ref(self))

    monkeypatch.setattr(block, "BlockView", Watched)
    model, _ = tiny_models.build("llama")
    options = {"bits": 4, "group": 16} | ({"steps": 2} if method == "flexround" else {})
    gc.collect()
    gc.disable()
    try:
        dither.quantize(model, build(method, options), TOKENS)
    finally:
        gc.enable()
    assert len(views) > 1 and views[-1]() is None
