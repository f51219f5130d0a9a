"""What is found on a cut copy of a model is what is found on all of it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import tiny_models
from dither import graph
from dither.graph import whole


def deep(name: str, blocks: int, **settings: Any) -> tuple[nn.Module, Any]:
    """A tiny model with more blocks than a cut copy keeps."""
    model, sample = tiny_models.build(name)
    config = copy.deepcopy(model.config)
    field = "n_layer" if hasattr(config, "n_layer") and name in ("gpt2", "bloom") else "num_hidden_layers"
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[i % 2] for i in range(blocks)]
    for key, value in ({field: blocks} | settings).items():
        setattr(config, key, value)
    torch.manual_seed(0)
    return type(model)(config).eval(), sample


def names(stream: graph.Residual) -> tuple[Any, ...]:
    norms = {(s.producer.parameter, tuple(c.parameter for c in s.consumers)) for s in stream.norms}
    return stream.width, stream.centred, set(stream.writers), set(stream.readers), norms, set(stream.ties)


MIXED = {"decoder_sparse_step": 2}  # every other block has experts


@pytest.mark.parametrize(
    ("name", "settings"),
    [("llama-tied", {}), ("qwen2", {}), ("gpt2", {}), ("phi3", {}), ("mixtral", {}), ("qwen3-moe", MIXED)],
)
def test_cut_copy_tells_what_the_whole_model_tells(name: str, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model, sample = deep(name, 6, **settings)
    truth = graph.discover(model, sample)
    monkeypatch.setattr(whole, "_by_all", None)  # must not be needed
    monkeypatch.setattr(whole, "LONG", 50)
    monkeypatch.setattr(whole, "ROWS", 20)
    before = [(n, p.shape, p.data_ptr()) for n, p in model.named_parameters()]
    found = graph.discover_whole(model, sample)
    assert [names(r) for r in found.residuals] == [names(r) for r in truth.residuals] and truth.residuals
    assert [b.name for b in found.blocks] == [b.name for b in truth.blocks]
    for block in found.blocks:
        sites = {str(s) for s in block.structure.prefixed(block.name).sites if s.kind == "scale"}
        assert sites == {str(s) for s in truth.sites if s.kind == "scale" and s.producer.name.startswith(f"{block.name}.")}
    assert before == [(n, p.shape, p.data_ptr()) for n, p in model.named_parameters()], "the model was changed"


def test_models_without_a_stream_say_why() -> None:
    post_norm, sample = tiny_models.build("bert")
    found = graph.discover_whole(post_norm, sample)
    assert found.residuals == [] and "stream cannot be rotated" in found.refused[0][1]


def test_shared_blocks_are_examined_whole() -> None:
    model, sample = deep("llama", 5)
    for block in model.model.layers[1:]:
        block.mlp = model.model.layers[0].mlp
    truth = graph.discover(model, sample)
    found = graph.discover_whole(model, sample)
    assert [names(r) for r in found.residuals] == [names(r) for r in truth.residuals]


def test_a_cut_that_does_not_run_is_not_used() -> None:
    model, sample = deep("llama", 5)

    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, input_ids: torch.Tensor) -> Any:
            assert len(self.inner.model.layers) == 5
            return self.inner(input_ids=input_ids)

    found = graph.discover_whole(Counts().eval(), sample)
    assert len(found.residuals[0].readers) == 5 * 5 + 1
