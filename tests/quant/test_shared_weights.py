"""Weights that modules share: the result is that of the model in which each has a copy of its own, or the weight stays one; never garbage."""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AlbertConfig, AlbertForMaskedLM

import dither
import tiny_models
from dither import models
from dither.errors import ModelError
from dither.formats import Int, group
from dither.quant.linear import QuantEmbedding, QuantLinear, SharedLinear
from dither.quant.recipes import AWQ, GPTQ, RTN, build

IDS = torch.randint(3, tiny_models.VOCABULARY, (8, 16), generator=torch.Generator().manual_seed(0))
ROWS = torch.randn(160, 32, generator=torch.Generator().manual_seed(1))
METHODS = [RTN(bits=8, group=16), GPTQ(bits=8, group=16)]
APART, TOGETHER = "are one tensor in the float model", "holds in several places"


class Two(nn.Module):
    """No chain of blocks: handled whole. ``b`` may share the weight of ``a``, or be the same module."""

    def __init__(self, shares: str = "") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.norm, self.b = nn.Linear(32, 32, bias=False), nn.LayerNorm(32), nn.Linear(32, 32, bias=False)
        self.c = nn.Linear(32, 32)
        if shares == "weight":
            self.b.weight = self.a.weight
        elif shares == "module":
            self.b = self.a
        elif shares == "copy":
            self.b = copy.deepcopy(self.a)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.c(self.b(self.norm(torch.tanh(self.a(x)))))
        return found


class Chain(nn.Module):
    """Three blocks between an embedding and a head that is tied to it: streamed."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(tiny_models.VOCABULARY, 32)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32)) for _ in range(3)
        )
        self.head = nn.Linear(32, tiny_models.VOCABULARY, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        for block in self.blocks:
            x = x + block(x)
        found: Tensor = self.head(x)
        return found


def shared_weight(model: Chain) -> None:
    model.blocks[2][1].weight = model.blocks[0][1].weight  # type: ignore[index]


def shared_layer(model: Chain) -> None:
    model.blocks[2][1] = model.blocks[0][1]  # type: ignore[index,operator]


def shared_norm(model: Chain) -> None:
    model.blocks[2][0] = model.blocks[0][0]  # type: ignore[index,operator]


def first_block_twice(model: Chain) -> None:
    model.blocks[1] = model.blocks[0]


def block_outside_too(model: Chain) -> None:
    blocks = model.blocks
    del model.blocks
    model.before, model.blocks = blocks[1], blocks


def weight_outside_too(model: Chain) -> None:
    model.after = nn.Linear(64, 32, bias=False)
    model.after.weight = model.blocks[0][3].weight  # type: ignore[index]


def out_of(model: nn.Module) -> Tensor:
    with torch.no_grad():
        if isinstance(model, Two):
            found: Tensor = model(ROWS)
        elif isinstance(model, Chain):
            found = model(IDS)
        else:
            found = model(input_ids=IDS, use_cache=False).logits
    return found


def error(result: nn.Module, model: nn.Module) -> float:
    a, b = out_of(result), out_of(model)
    return float((a - b).norm() / b.norm())


def untied(model: nn.Module) -> nn.Module:
    """The same function with a copy of its own in every place: modules first, then parameters; heads stay tied to their embedding."""

    def copied(part: nn.Module) -> nn.Module:
        new = copy.copy(part)
        vars(new).update({key: copy.copy(value) for key, value in vars(part).items() if isinstance(value, dict)})
        for key, child in part._modules.items():
            new._modules[key] = None if child is None else copied(child)
        return new

    new = copied(model)
    table = new.get_input_embeddings().weight if hasattr(new, "get_input_embeddings") else getattr(getattr(new, "embed", None), "weight", None)
    for part in new.modules():
        for key, value in part._parameters.items():
            if value is not None and value is not table:
                part._parameters[key] = nn.Parameter(value.detach().clone())
    return new


def run(model: nn.Module, recipe: Any, out: Path | None = None) -> dither.Quantized:
    return dither.quantize(model, recipe, [{"x": ROWS} if isinstance(model, Two) else {"input_ids": IDS}], out)


def notes(result: dither.Quantized, what: str) -> list[str]:
    return [note for note in result.report.notes if what in note]


def check(model: nn.Module, recipe: Any, folder: Path) -> dither.Quantized:
    """In memory and by a folder, the model does what the quantized untied copy does; nothing is without values; the caller's model is left alone."""
    wanted, before = run(untied(model), recipe), out_of(model)
    held, stored = run(model, recipe), run(model, recipe, folder / "out")
    for result in (held, stored):
        assert not any(t.is_meta for t in [*result.model.parameters(), *result.model.buffers()])
        assert torch.equal(out_of(result.model), out_of(wanted.model)) and error(result.model, model) < 0.02
        assert result.bits_per_weight == wanted.bits_per_weight
        assert len(result.report.layers) == len(wanted.report.layers)
        assert len(notes(result, APART)) == 1 and "\n" not in notes(result, APART)[0]
    assert torch.equal(out_of(model), before)
    return stored


@pytest.mark.parametrize("recipe", METHODS, ids=lambda r: r.name)
def test_layers_of_one_block_that_share_a_parameter(recipe: Any, tmp_path: Path) -> None:
    model = Two("weight")
    result = check(model, recipe, tmp_path)
    assert "b.weight (as a.weight)" in notes(result, APART)[0]
    assert model.b.weight is model.a.weight
    assert {row.name for row in result.report.layers} == {"a", "b", "c"}
    with safe_open(tmp_path / "out/model.safetensors", "pt") as file:
        assert {"a.codes", "b.codes"} <= set(file.keys())  # each with bits of its own


@pytest.mark.parametrize("recipe", METHODS, ids=lambda r: r.name)
def test_one_module_in_two_places_of_a_block_stays_one(recipe: Any, tmp_path: Path) -> None:
    model = Two("module")
    for out in (None, tmp_path / "out"):
        result = run(model, recipe, out)
        assert isinstance(result.model.a, QuantLinear) and result.model.a is result.model.b
        assert error(result.model, model) < 0.02 and "b.weight (as a.weight)" in notes(result, TOGETHER)[0]
        assert {row.name for row in result.report.layers} == {"a", "c"} and not notes(result, APART)
        if recipe.name == "rtn":
            assert torch.equal(out_of(result.model), out_of(run(Two("copy"), recipe).model))


@pytest.mark.parametrize("recipe", [*METHODS, AWQ(bits=8, group=16)], ids=lambda r: r.name)
@pytest.mark.parametrize(
    "tie", [shared_weight, shared_layer, shared_norm, first_block_twice, block_outside_too, weight_outside_too], ids=lambda f: f.__name__
)
def test_blocks_that_share(tie: Callable[[Chain], None], recipe: Any, tmp_path: Path) -> None:
    model = Chain()
    tie(model)
    result = check(model, recipe, tmp_path)
    assert result.model.head.weight is result.model.embed.weight  # that tie stays
    whole = any("handled whole" in note for note in result.report.notes)
    assert whole == tie.__name__.endswith("outside_too")  # with a copy outside, the blocks are no longer nearly all of the model


@pytest.mark.parametrize("recipe", METHODS, ids=lambda r: r.name)
def test_one_block_called_again_and_again_stays_one(recipe: Any, tmp_path: Path) -> None:
    model = Chain()
    model.blocks[1] = model.blocks[2] = model.blocks[0]
    for out in (None, tmp_path / "out"):
        result = run(model, recipe, out)
        assert len(result.report.layers) == 2 and len({id(block) for block in result.model.blocks}) == 1
        assert error(result.model, model) < 0.02


def test_a_list_of_blocks_under_two_names_is_one_list(tmp_path: Path) -> None:
    model = Chain()
    model.again = model.blocks
    for out in (None, tmp_path / "out"):
        result = run(model, METHODS[0], out)
        assert len(result.report.layers) == 6 and error(result.model, model) < 0.02
        assert isinstance(result.model.again[2][3], QuantLinear) and result.model.again[2] is result.model.blocks[2]


@pytest.mark.parametrize("few_bit", [False, True])
def test_heads_of_plain_modules_stay_tied(few_bit: bool, tmp_path: Path) -> None:
    model, recipe = Chain(), METHODS[0].recipe()
    if few_bit:
        recipe = dataclasses.replace(recipe, embeddings=Int(8) @ group(16))
    for out in (None, tmp_path / "out"):
        result = run(model, recipe, out)
        assert error(result.model, model) < 0.02 and not notes(result, APART)
        assert isinstance(result.model.head, SharedLinear) == isinstance(result.model.embed, QuantEmbedding) == few_bit


def llama(tie: str) -> nn.Module:
    model, _ = tiny_models.build("llama")
    model.config.use_cache = False
    first, second = model.model.layers
    if tie == "mlp":
        second.mlp = first.mlp
    elif tie == "attention":
        second.self_attn = first.self_attn
    elif tie == "layer in block":
        first.mlp.up_proj = first.mlp.gate_proj
    elif tie == "weight in block":
        first.mlp.up_proj.weight = first.mlp.gate_proj.weight
    elif tie == "norm":
        model.model.norm = first.input_layernorm
    return model


@pytest.mark.parametrize("recipe", [*METHODS, RTN(bits=8, group=16, kv_bits=8)], ids=["rtn", "gptq", "kv"])
@pytest.mark.parametrize("tie", ["mlp", "attention", "layer in block", "weight in block", "norm"])
def test_transformers_models(tie: str, recipe: Any, tmp_path: Path) -> None:
    """Their folder is loaded into a model that is built from its configuration, in which nothing is shared."""
    model = llama(tie)
    result = check(model, recipe, tmp_path)
    back, _ = dither.load(tmp_path / "out")
    assert torch.equal(out_of(back), out_of(result.model))
    if tie == "mlp":
        assert "model.layers.1.mlp.gate_proj.weight (as model.layers.0.mlp.gate_proj.weight)" in notes(result, APART)[0]
        assert back.model.layers[1].mlp is not back.model.layers[0].mlp


def test_model_stages_see_the_copies(tmp_path: Path) -> None:
    recipe = build("quarot", {"bits": 8, "group": 16, "act_bits": 8, "kv_bits": 8})
    for out in (None, tmp_path / "out"):
        assert error(run(llama("mlp"), recipe, out).model, llama("mlp")) < 0.05


def test_a_head_tied_by_hand_is_stored_where_the_configuration_does_not_tie_it(tmp_path: Path) -> None:
    model, _ = tiny_models.build("llama")
    model.lm_head.weight = model.model.embed_tokens.weight
    for out in (None, tmp_path / "out"):
        result = run(model, METHODS[0], out)
        assert error(result.model, model) < 0.02 and "lm_head.weight" in notes(result, APART)[0]


def test_ties_by_configuration_stay(tmp_path: Path) -> None:
    model, _ = tiny_models.build("llama-tied")
    for out in (None, tmp_path / "out"):
        result = run(model, METHODS[0], out)
        assert result.model.lm_head.weight is result.model.model.embed_tokens.weight
        assert error(result.model, model) < 0.02 and not notes(result, APART) and not notes(result, TOGETHER)


@pytest.mark.parametrize("recipe", METHODS, ids=lambda r: r.name)
def test_albert_is_one_layer_called_several_times(recipe: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 96, "hidden_size": 32, "embedding_size": 16, "num_attention_heads": 4, "intermediate_size": 48}
    model = AlbertForMaskedLM(AlbertConfig(**sizes, num_hidden_layers=3, max_position_embeddings=64, architectures=["AlbertForMaskedLM"])).eval()
    for out in (None, tmp_path / "out"):
        result = dither.quantize(model, recipe, [{"input_ids": IDS}], out)
        with torch.no_grad():
            a, b = result.model(input_ids=IDS).logits, model(input_ids=IDS).logits
        assert float((a - b).norm() / b.norm()) < 0.02
        assert sum("albert_layers" in row.name for row in result.report.layers) == 6
        assert not notes(result, APART) and not notes(result, TOGETHER)


def test_blocks_that_share_by_architecture_are_refused_before_work_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their loader would build a model that shares again, and give both blocks what was stored last."""
    llama("").save_pretrained(tmp_path / "model")
    source = models.open(tmp_path / "model")
    build_plain = source.skeleton

    def skeleton(*args: Any) -> nn.Module:
        model = build_plain(*args)
        model.model.layers[1].mlp = model.model.layers[0].mlp
        return model

    monkeypatch.setattr(source, "skeleton", skeleton)
    monkeypatch.setattr(models, "open", lambda name: source)
    pair = "model.layers.0.mlp.gate_proj.weight and model.layers.1.mlp.gate_proj.weight are one weight"
    with pytest.raises(ModelError, match=re.escape(pair)) as raised:
        dither.quantize(tmp_path / "model", METHODS[0], [{"input_ids": IDS}], tmp_path / "out")
    assert "\n" not in str(raised.value) and not list((tmp_path / "out").rglob("*.safetensors"))


def test_separate_copies_only_what_it_must() -> None:
    model = Chain()
    shared_layer(model)
    models.separate(model, ["blocks.2.1.weight", "no.such.weight"])
    first, second = model.blocks[0][1], model.blocks[2][1]  # type: ignore[index]
    assert first is not second and first.weight is not second.weight and torch.equal(first.weight, second.weight)
    assert first.bias is second.bias and model.head.weight is model.embed.weight
