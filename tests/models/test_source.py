"""Checkpoints read tensor by tensor give what transformers gives when it loads them whole."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from dither import models
from dither.errors import CheckpointError, ModelError

Save = Callable[..., Path]
Tiny = Callable[..., nn.Module]


def reference(folder: Path, **options: Any) -> nn.Module:
    model: nn.Module = models.auto_class(folder).from_pretrained(folder, **options)
    return model.eval()


def outputs(model: nn.Module) -> torch.Tensor:
    torch.manual_seed(1)
    images, ids = torch.randn(2, 3, 16, 16), torch.randint(3, 96, (2, 12))
    with torch.no_grad():
        return model(images if "Image" in type(model).__name__ else ids).logits


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral", "qwen2_moe", "bert", "vit"])
@pytest.mark.parametrize("shard", ["5GB", "9KB"])
def test_tensors_are_those_of_from_pretrained(kind: str, shard: str, tiny: Tiny, save: Save) -> None:
    folder = save(tiny(kind), shard)
    if shard != "5GB":
        assert len(list(folder.glob("*.safetensors"))) > 1
    whole = reference(folder)
    source = models.open(folder)
    expected = whole.state_dict()
    assert set(source.names()) == set(expected)
    assert source.notes == []
    for name, tensor in expected.items():
        assert source.shape(name) == tuple(tensor.shape)
        read = source.tensor(name)
        assert read.dtype == tensor.dtype == source.dtype_of(name)
        assert torch.equal(read, tensor), name
    loaded, _ = models.load(folder)
    assert torch.equal(outputs(loaded), outputs(whole))
    assert all(torch.equal(a, b) for a, b in zip(loaded.buffers(), whole.buffers(), strict=True))


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral"])
def test_blocks_filled_one_by_one_make_the_whole_model(kind: str, tiny: Tiny, save: Save) -> None:
    folder = save(tiny(kind), "9KB")
    whole, source = reference(folder), models.open(folder)
    model = source.skeleton()
    assert all(p.is_meta for p in model.parameters())
    assert not any(b.is_meta for b in model.buffers())
    assert not model.training
    lists = [n for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == 2]
    blocks = [f"{lists[0]}.{i}" for i in range(2)]
    source.fill(model, "", except_prefixes=blocks)
    for block in blocks:
        assert all(p.is_meta for p in model.get_submodule(block).parameters())
        source.fill(model.get_submodule(block), block)
    assert torch.equal(outputs(model), outputs(whole))
    for block in blocks:
        source.release(model.get_submodule(block))
        assert all(p.is_meta for p in model.get_submodule(block).parameters())
        source.fill(model.get_submodule(block), block, dtype=torch.float32)
    assert torch.equal(outputs(model), outputs(whole))


@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_half_precision_is_kept_and_converted(kind: str, tiny: Tiny, save: Save) -> None:
    folder = save(tiny(kind).to(torch.bfloat16))
    source = models.open(folder)
    assert source.dtype == torch.bfloat16
    name = source.names()[2]
    expected = reference(folder, dtype=torch.bfloat16).state_dict()[name]
    assert torch.equal(source.tensor(name), expected)
    assert torch.equal(source.tensor(name, torch.float32), expected.float())
    assert torch.equal(models.open(folder, dtype=torch.float32).tensor(name), expected.float())
    assert {p.dtype for p in source.skeleton().parameters()} == {torch.bfloat16}
    assert torch.equal(outputs(models.load(folder)[0]), outputs(reference(folder, dtype=torch.float32)))


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_tied_weights(kind: str, tiny: Tiny, save: Save) -> None:
    model = tiny(kind, tie_word_embeddings=True)
    folder = save(model)
    source = models.open(folder)
    (alias, owner), *others = source.tied.items()
    assert alias == "lm_head.weight" and not others
    assert torch.equal(source.tensor(alias), source.tensor(owner))
    skeleton = source.skeleton()
    assert skeleton.get_parameter(alias) is skeleton.get_parameter(owner)
    source.fill(skeleton)
    assert skeleton.get_parameter(alias) is skeleton.get_parameter(owner)
    assert torch.equal(outputs(skeleton), outputs(model))

    weights = folder / "model.safetensors"
    tensors = load_file(weights)
    renamed = {alias if name == owner else name: tensor for name, tensor in tensors.items()}
    save_file(renamed, weights, metadata={"format": "pt"})  # the shared tensor under its other name
    assert torch.equal(outputs(models.load(folder)[0]), outputs(model))

    save_file(tensors | {alias: tensors[owner].clone()}, weights, metadata={"format": "pt"})  # stored twice
    assert dict(models.open(folder).tied) == {alias: owner}

    save_file(tensors | {alias: tensors[owner] + 1}, weights, metadata={"format": "pt"})  # not shared after all
    source = models.open(folder)
    assert not source.tied and alias in source.notes[0]
    assert torch.equal(outputs(models.load(folder)[0]), outputs(reference(folder)))


def test_memory_source_serves_the_same(tiny: Tiny, save: Save, tokenizer: Any) -> None:
    model = tiny("llama", tie_word_embeddings=True)
    source = models.MemorySource(model, tokenizer)
    before = {n: p.clone() for n, p in model.named_parameters()}
    assert set(source.names()) == set(model.state_dict())
    assert dict(source.tied) == {"lm_head.weight": "model.embed_tokens.weight"}
    skeleton = source.skeleton()
    assert all(p.is_meta for p in skeleton.parameters()) and not any(b.is_meta for b in skeleton.buffers())
    source.fill(skeleton)
    assert torch.equal(outputs(skeleton), outputs(model))
    skeleton.get_parameter("model.norm.weight").data.zero_()
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters())
    assert source.fingerprint() == models.MemorySource(tiny("llama", tie_word_embeddings=True)).fingerprint()
    model.get_parameter("model.norm.weight").data[0] += 1
    assert source.fingerprint() != models.MemorySource(tiny("llama", tie_word_embeddings=True)).fingerprint()
    assert "tokenizer.json" in dict(source.sidecars())


def test_memory_source_of_any_module() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2)).double().eval()
    source = models.MemorySource(model)
    assert source.config is None and source.dtype == torch.float64 and source.name == "Sequential"
    skeleton = source.skeleton()
    source.fill(skeleton)
    x = torch.randn(3, 4, dtype=torch.float64)
    assert torch.equal(skeleton(x), model(x))
    with pytest.raises(ModelError, match="without a tokenizer"):
        source.tokenizer()


def test_fingerprint_follows_the_weights_not_the_place(tiny: Tiny, save: Save, tmp_path: Path) -> None:
    folder = save(tiny("llama"))
    first = models.open(folder).fingerprint()
    shutil.copytree(folder, tmp_path / "copy")
    assert models.open(tmp_path / "copy").fingerprint() == first and len(first) == 16
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"] + 1
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert models.open(folder).fingerprint() != first


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_named(value: float, tiny: Tiny, save: Save) -> None:
    model = tiny("llama")
    name = "model.layers.1.mlp.down_proj.weight"
    model.get_parameter(name).data[3, 5] = value
    model.get_parameter(name).data[7, 1] = value
    folder = save(model)
    source = models.open(folder)
    assert not torch.isfinite(source.tensor(name)).all()
    pattern = rf"tensor {name} holds {value} at \[3, 5\]"
    with pytest.raises(CheckpointError, match=pattern):
        source.tensor(name, check_finite=True)
    skeleton = source.skeleton()
    source.fill(skeleton.get_submodule("model.layers.0"), "model.layers.0")
    with pytest.raises(CheckpointError, match=pattern):
        source.fill(skeleton.get_submodule("model.layers.1"), "model.layers.1")
    with pytest.raises(CheckpointError, match=pattern):
        models.load(folder)


def test_missing_surplus_and_misshapen_tensors(tiny: Tiny, save: Save) -> None:
    folder = save(tiny("llama"))
    weights = folder / "model.safetensors"
    tensors = load_file(weights)

    save_file(tensors | {"model.extra.weight": torch.ones(3)}, weights, metadata={"format": "pt"})
    assert "model.extra.weight" in models.open(folder).notes[0]

    lost = "model.layers.1.self_attn.q_proj.weight"
    save_file({n: t for n, t in tensors.items() if n != lost}, weights, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=f"lacks the tensor {lost}"):
        models.open(folder)

    save_file(tensors | {lost: tensors[lost].T.contiguous()[:8]}, weights, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"{lost} has the shape \[8, 32\], but the config says \[32, 32\]"):
        models.open(folder)


@pytest.mark.parametrize(
    "change",
    [
        {"num_hidden_layers": 10**9},
        {"num_hidden_layers": -1},
        {"hidden_size": 10**9},
        {"vocab_size": 10**12},
        {"intermediate_size": 10**7},
        {"hidden_size": "wide"},
        {"num_attention_heads": 0},
        {"hidden_act": "no such thing"},
    ],
)
def test_configs_that_lie(change: dict[str, Any], tiny: Tiny, save: Save) -> None:
    folder = save(tiny("llama"))
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ModelError) as caught:
        models.open(folder)
    assert "\n" not in str(caught.value)


ONE_BY_ONE = """
import sys, psutil
from dither import models

source, process = models.open(sys.argv[1]), psutil.Process()
skeleton = source.skeleton()
blocks = [skeleton.get_submodule(f"model.layers.{i}") for i in range(8)]
source.fill(blocks[0], "model.layers.0")  # warms up
source.release(blocks[0])
before, most = process.memory_info().rss, 0
for i, block in enumerate(blocks):
    source.fill(block, f"model.layers.{i}")
    most = max(most, process.memory_info().rss - before)
    source.release(block)
print(most, process.memory_info().rss - before)
"""


def test_memory_of_one_block(tiny: Tiny, save: Save) -> None:
    """Reading a block of 30 MB from a file of 240 MB costs the block, not the file (20 MB are allowed for what else a process does); in a process
    of its own, whose allocator gives large pieces back at once, so that what is held is what is used."""
    model = tiny("llama", hidden_size=512, intermediate_size=4096, num_hidden_layers=8, vocab_size=64)
    block_bytes = sum(p.nbytes for p in model.get_submodule("model.layers.0").parameters())
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    ran = subprocess.run([sys.executable, "-c", ONE_BY_ONE, str(save(model))], capture_output=True, text=True, check=True, env=environment)
    most, left = map(int, ran.stdout.split()[-2:])
    assert block_bytes <= most < block_bytes + 20e6 and left < 20e6


def test_sidecars_hold_the_tokenizer_and_no_weights(tiny: Tiny, save: Save, tokenizer: Any) -> None:
    folder = save(tiny("llama"), "9KB")
    tokenizer.save_pretrained(folder)
    source = models.open(folder)
    files = dict(source.sidecars())
    assert {"tokenizer.json", "tokenizer_config.json", "generation_config.json"} <= set(files)
    assert not any(name == "config.json" or "safetensors" in name for name in files)
    assert source.tokenizer()("word").input_ids == tokenizer("word").input_ids
    assert source.generation_config.eos_token_id == 2
    assert str(folder) not in source.config.to_json_string()
