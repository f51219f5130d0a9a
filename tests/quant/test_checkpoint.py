"""dither's own checkpoint: what is loaded is what was made, and damage is told of in one line."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

import dither
import tiny_folder
import tiny_models
from dither.errors import CheckpointError, ModelError
from dither.formats import Int, group
from dither.quant import checkpoint, hf
from dither.quant.linear import QuantWeight, SharedLinear

TOKENS = torch.arange(3, 67).view(4, 16)
RTN = dither.recipes.RTN(bits=4, group=16)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


def saved(folders: Path, name: str) -> Path:
    """A tiny model on disk."""
    folder = folders / name
    if not folder.exists():
        tiny_models.build(name)[0].save_pretrained(folder)
    return folder


def made(folders: Path, name: str, recipe: Any = RTN) -> Path:
    """Its checkpoint."""
    out = folders / f"{name}-w4"
    if not out.exists():
        dither.quantize(saved(folders, name), recipe, TOKENS, out)
    return out


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    found: Tensor = model(TOKENS, use_cache=False).logits
    return found


def loaded(folder: Path, **options: Any) -> nn.Module:
    """By transformers, which must report nothing lost and nothing left over."""
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    assert isinstance(model, nn.Module)
    return model


def modules(model: nn.Module) -> list[QuantWeight]:
    return [m for m in model.modules() if isinstance(m, QuantWeight)]


# -- what is loaded is what was made ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "llama-tied", "gpt2", "mixtral", "gemma2", "falcon-new", "mamba"])
def test_transformers_loads_what_is_in_memory(folders: Path, name: str) -> None:
    in_memory = dither.quantize(saved(folders, name), RTN, TOKENS).model
    model = loaded(made(folders, name))
    assert modules(model) and torch.equal(logits(model), logits(in_memory))
    ours, theirs = in_memory.state_dict(), model.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[k], theirs[k]) and ours[k].dtype == theirs[k].dtype for k in ours)


def test_what_is_not_quantized_keeps_its_values(folders: Path) -> None:
    before, after = tiny_models.build("llama")[0].state_dict(), loaded(made(folders, "llama")).state_dict()
    kept = [n for n in after if n in before]
    assert {"model.embed_tokens.weight", "model.norm.weight", "model.layers.0.input_layernorm.weight"} <= set(kept)
    assert all(torch.equal(before[n], after[n]) for n in kept)


SCRIPT = """
import sys
import dither
assert "torch" not in sys.modules
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
tokens = torch.arange(3, 67).view(4, 16)
made = model.generate(tokens[:1], max_new_tokens=5, do_sample=False)
from safetensors.torch import save_file
save_file({"logits": model(tokens, use_cache=False).logits.detach().contiguous(), "made": made}, sys.argv[2])
"""


def test_a_fresh_process_needs_only_import_dither(folders: Path, tmp_path: Path) -> None:
    out, answer = made(folders, "llama"), tmp_path / "answer.safetensors"
    subprocess.run([sys.executable, "-c", SCRIPT, out, answer], check=True, capture_output=True, cwd=tmp_path)
    told, model = load_file(answer), loaded(out)
    assert torch.equal(told["logits"], logits(model))
    again = model.generate(TOKENS[:1], max_new_tokens=5, do_sample=False)
    assert again.shape[1] > 16 and torch.equal(told["made"], again)


@pytest.mark.parametrize("dtype", ["auto", torch.float32, torch.bfloat16, torch.float16])
def test_stored_types_survive_any_compute_type(folders: Path, dtype: Any) -> None:
    model = loaded(made(folders, "llama"), dtype=dtype)
    wanted = torch.float32 if dtype == "auto" else dtype
    assert {p.dtype for p in model.parameters()} == {wanted}
    for module in modules(model):
        module.check()
    assert logits(model).dtype == wanted
    exact = logits(loaded(made(folders, "llama")))
    assert (logits(model).float() - exact).abs().max() < 0.05 * exact.abs().max()


def test_names_that_transformers_keeps_in_float32_do_not_touch_buffers(folders: Path) -> None:
    """T5 keeps every parameter whose name has "wo" in float32; our scales are not parameters."""
    model, sample = tiny_models.build("t5")
    model.save_pretrained(folders / "t5")
    out = folders / "t5-w4"
    dither.quantize(folders / "t5", dither.recipes.GPTQ(bits=4, group=16), sample, out)
    back = AutoModelForSeq2SeqLM.from_pretrained(out, dtype=torch.bfloat16)
    assert any("wo" in n for n, m in back.named_modules() if isinstance(m, QuantWeight))
    for module in modules(back):
        module.check()
    with torch.no_grad():
        assert back(**sample).logits.isfinite().all()


def test_half_of_a_result_in_memory_keeps_what_is_stored(folders: Path) -> None:
    model = dither.quantize(saved(folders, "mixtral"), RTN, TOKENS).model
    before = logits(model)
    torch.nn.Module.half(model)  # transformers' own refuses quantized models
    for module in modules(model):
        module.check()
    assert logits(model).dtype == torch.float16
    assert (logits(model).float() - before).abs().max() < 0.02 * before.abs().max()


def test_a_result_in_memory_saves_itself(folders: Path, tmp_path: Path) -> None:
    model = dither.quantize(saved(folders, "llama-tied"), RTN, TOKENS).model
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(loaded(tmp_path / "again")), logits(model))


@pytest.mark.parametrize("name", ["llama-tied", "gpt2", "mixtral"])
def test_save_pretrained_round_trip(folders: Path, tmp_path: Path, name: str) -> None:
    model = loaded(made(folders, name))
    model.save_pretrained(tmp_path / "again")
    assert checkpoint.is_checkpoint(tmp_path / "again")
    assert torch.equal(logits(loaded(tmp_path / "again")), logits(model))
    assert torch.equal(logits(dither.load(tmp_path / "again")[0]), logits(model))


def test_an_adopted_result_saves_a_folder_that_loads(folders: Path, tmp_path: Path) -> None:
    """Without being told that it is quantized, transformers would write a folder whose weights come back random."""
    model = dither.quantize(saved(folders, "llama"), RTN, TOKENS).model
    config = json.loads((made(folders, "llama") / "config.json").read_text())["quantization_config"]
    hf.adopt(model, config)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(loaded(tmp_path)), logits(model))
    hf.adopt(nn.Linear(2, 2), config)  # nothing to tell


@pytest.mark.parametrize("tied", [True, False])
def test_quantized_embeddings_and_heads(folders: Path, tmp_path: Path, tied: bool) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=320,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        tie_word_embeddings=tied,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(tmp_path / "float")
    names = {"model.embed_tokens": Int(8) @ group(16)} | ({} if tied else {"lm_head": Int(8) @ group(16)})
    recipe = dither.recipes.RTN(bits=4, group=16, overrides=names)
    dither.quantize(tmp_path / "float", recipe, TOKENS, tmp_path / "out")
    back = loaded(tmp_path / "out")
    assert isinstance(back.lm_head, SharedLinear) == tied
    for name, parameter in model.state_dict().items():  # the same numbers in a float model
        path, _, leaf = name.rpartition(".")
        held = back.get_submodule(path)
        parameter.copy_(getattr(held, leaf))
    assert torch.equal(logits(back), logits(model.eval()))
    back.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(loaded(tmp_path / "again")), logits(back))
    assert not any("lm_head" in n for n in load_file(tmp_path / "out" / "model.safetensors")) or not tied


# -- modules that are none of transformers' ------------------------------------------------------------------------------


def mlp() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 20), nn.Tanh(), nn.Linear(20, 16)), torch.randn(
        9, 12
    )


def test_any_module_comes_back_into_a_fresh_one(tmp_path: Path) -> None:
    model, x = mlp()
    result = dither.quantize(model, RTN, {"input": x}, tmp_path / "out")
    in_memory = dither.quantize(model, RTN, {"input": x}).model
    fresh = mlp()[0]
    for parameter in fresh.parameters():
        nn.init.zeros_(parameter)
    back, tokenizer = dither.load(tmp_path / "out", model=fresh)
    assert back is fresh and tokenizer is None
    with torch.no_grad():
        assert torch.equal(back(x), in_memory(x)) and torch.equal(result.model(x), in_memory(x))
        assert not torch.equal(back(x), model(x)) and isinstance(model[0], nn.Linear)  # the user's model is as it was
    with pytest.raises(ValueError, match="dtype"):
        dither.load(tmp_path / "out", dtype=torch.float16, model=mlp()[0])


def test_a_module_of_another_shape_is_refused(tmp_path: Path) -> None:
    model, x = mlp()
    dither.quantize(model, RTN, {"input": x}, tmp_path / "out")
    for other in (
        nn.Sequential(nn.Linear(12, 32)),
        nn.Sequential(nn.Linear(12, 24)),
        nn.Sequential(*mlp()[0], nn.Linear(16, 2)),
    ):
        with pytest.raises(CheckpointError) as error:
            dither.load(tmp_path / "out", model=other)
        assert "\n" not in str(error.value)


# -- damage ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def copy(folders: Path, tmp_path: Path) -> Path:
    shutil.copytree(made(folders, "llama"), tmp_path / "copy")
    return tmp_path / "copy"


def change(folder: Path, edit: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    edit(config["quantization_config"])
    (folder / "config.json").write_text(json.dumps(config))


def refused(folder: Path, kind: type[Exception] = CheckpointError) -> str:
    with pytest.raises(kind) as error:
        dither.load(folder)
    text = str(error.value)
    assert "\n" not in text and len(text) < 600
    return text


NAME = "model.layers.0.mlp.up_proj.weight"
DAMAGE: dict[str, Any] = {
    "newer": lambda q: q.update(version=99),
    "no version": lambda q: q.pop("version"),
    "no layers": lambda q: q.pop("layers"),
    "layers a list": lambda q: q.update(layers=[1]),
    "no such scheme": lambda q: q["layers"][NAME].update(scheme=7),
    "negative scheme": lambda q: q["layers"][NAME].update(scheme=-1),
    "bits 99": lambda q: q["schemes"][0]["format"].update(bits=99),
    "another width": lambda q: q["schemes"][0]["format"].update(bits=3),
    "unknown format": lambda q: q["schemes"][0]["format"].update(kind="prime"),
    "no such layer": lambda q: q["layers"].update({"model.nowhere.weight": q["layers"][NAME]}),
    "a method": lambda q: q["layers"].update({"model.layers.0.mlp.up_proj.forward": q["layers"][NAME]}),
    "negative size": lambda q: q["layers"][NAME].update(shape=[-48, 32]),
    "absurd size": lambda q: q["layers"][NAME].update(shape=[1 << 60, 32]),
    "another shape": lambda q: q["layers"][NAME].update(shape=[32, 48], storage=[32, 48]),
    "transposed": lambda q: q["layers"][NAME].update(shape=[32, 48]),
    "text for a size": lambda q: q["layers"][NAME].update(shape="48x32"),
    "unknown kind": lambda q: q["layers"][NAME].update(kind="magic"),
    "an entry too few": lambda q: q["layers"].pop(NAME),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damaged_quantization_config(copy: Path, what: str) -> None:
    change(copy, DAMAGE[what])
    refused(copy)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"quantization_config": 3}', "\x00\xff"])
def test_damaged_config_json(copy: Path, text: str) -> None:
    (copy / "config.json").write_text(text, encoding="latin-1")
    assert "config.json" in refused(copy)
    assert checkpoint.is_checkpoint(copy)  # its report is still there


def test_float_models_and_unfinished_runs_are_told_apart(folders: Path, copy: Path, tmp_path: Path) -> None:
    assert "float model" in refused(saved(folders, "llama"), ModelError)
    assert not checkpoint.is_checkpoint(saved(folders, "llama"))
    assert "no such folder" in refused(tmp_path / "nowhere", ModelError)
    (copy / ".partial").mkdir()
    assert "not finished" in refused(copy)
    (tmp_path / "empty").mkdir()
    assert "config.json" in refused(tmp_path / "empty")


def rewrite(folder: Path, edit: Any) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


PREFIX = "model.layers.0.mlp.up_proj"
TENSORS: dict[str, Any] = {
    "missing scales": lambda t: t.pop(f"{PREFIX}.scale"),
    "missing norm": lambda t: t.pop("model.norm.weight"),
    "too wide": lambda t: t.update({f"{PREFIX}.codes": torch.zeros(48, 99, dtype=torch.uint8)}),
    "wrong type": lambda t: t.update({f"{PREFIX}.codes": torch.zeros(48, 16, dtype=torch.int32)}),
    "scales not finite": lambda t: t[f"{PREFIX}.scale"].fill_(float("nan")),
    "zero points cut": lambda t: t.update({f"{PREFIX}.zero_point": t[f"{PREFIX}.zero_point"][:-1].clone()}),
    "stranger": lambda t: t.update({f"{PREFIX}.more": torch.zeros(3)}),
}


@pytest.mark.parametrize("what", TENSORS)
def test_damaged_tensors(copy: Path, what: str) -> None:
    rewrite(copy, TENSORS[what])
    assert "model." in refused(copy)


def test_truncated_and_missing_shards(copy: Path) -> None:
    path = copy / "model.safetensors"
    whole = path.read_bytes()
    for length in (0, 7, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        refused(copy)
    path.unlink()
    refused(copy)
    index = {"metadata": {}, "weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(copy)


def test_the_tokenizer_comes_along(tmp_path: Path) -> None:
    tiny_folder.save(tmp_path / "float")
    dither.quantize(tmp_path / "float", RTN, TOKENS, tmp_path / "out")
    model, tokenizer = dither.load(tmp_path / "out")
    assert tokenizer("few bits")["input_ids"] and not model.training
    assert dither.load(tmp_path / "out", dtype=torch.bfloat16)[0].dtype == torch.bfloat16


@pytest.mark.slow
def test_smollm2(tmp_path: Path) -> None:
    dither.quantize("smollm2", dither.recipes.RTN(bits=4, group=64), None, tmp_path / "out")
    model, tokenizer = dither.load(tmp_path / "out")
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    made = again.generate(ids, max_new_tokens=6, do_sample=False)
    assert "Paris" in tokenizer.decode(made[0])
    assert torch.equal(model(ids).logits, again(ids).logits)
