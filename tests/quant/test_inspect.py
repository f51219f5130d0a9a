"""What `inspect` writes down, against the same figures computed by hand from hooks on the float model."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor, nn

import tiny_folder
import tiny_models
from dither.errors import ModelError
from dither.formats import Int, group
from dither.quant.inspect import WIDTHS, inspect, kurtosis
from dither.report import InspectRecord


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    """Its second block reads a channel that is much larger than the others."""
    model, _ = tiny_models.build("llama-tied")
    with torch.no_grad():
        model.model.layers[1].input_layernorm.weight[5] *= 40
    return model


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    return torch.randint(3, tiny_models.VOCABULARY, (6, 24), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def record(model: nn.Module, tokens: Tensor) -> InspectRecord:
    torch.set_num_threads(1)
    return InspectRecord.model_validate(
        inspect(model, tokens, group=16, tokenizer=tiny_folder.tokenizer(), compute=torch.float32)
    )


def inputs(model: nn.Module, tokens: Tensor) -> dict[str, Tensor]:
    """What each Linear of the float model reads, ``[T, I]``."""
    seen: dict[str, Tensor] = {}
    hooks = [
        module.register_forward_pre_hook(lambda m, x, name=name: seen.update({name: x[0].reshape(-1, x[0].shape[-1])}))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    with torch.no_grad():
        model(input_ids=tokens)
    for hook in hooks:
        hook.remove()
    return seen


def test_figures_equal_direct_computation(model: nn.Module, tokens: Tensor, record: InspectRecord) -> None:
    seen = inputs(model, tokens)
    modules = dict(model.named_modules())
    assert {layer.name for layer in record.layers} == set(seen) - {"lm_head"}
    for layer in record.layers:
        weight, x = modules[layer.name].weight.detach(), seen[layer.name]
        peaks = x.abs().amax(0)
        assert layer.shape == tuple(weight.shape)
        assert layer.weight_kurtosis == pytest.approx(stats.kurtosis(weight.flatten(), fisher=False), rel=1e-4)
        assert layer.weight_absmax == pytest.approx(float(weight.abs().max()))
        assert layer.input_absmax == pytest.approx(float(peaks.max()), rel=1e-4)
        assert layer.input_max_over_median == pytest.approx(float(peaks.max() / peaks.median()), rel=1e-4)
        assert layer.input_kurtosis == pytest.approx(stats.kurtosis(x.flatten(), fisher=False), rel=1e-3)
        for bits in WIDTHS:
            error = x @ ((Int(bits) @ group(16)).quantize(weight) - weight).T
            expected = float(error.square().sum() / (x @ weight.T).square().sum())
            assert layer.rtn_error[bits] == pytest.approx(expected, rel=2e-3), (layer.name, bits)


def test_outliers_stand_out_and_errors_grow_as_bits_shrink(record: InspectRecord) -> None:
    ratio = {layer.name: layer.input_max_over_median or 0 for layer in record.layers}
    assert ratio["model.layers.1.self_attn.q_proj"] > 5 * ratio["model.layers.0.self_attn.q_proj"]
    for layer in record.layers:
        assert 0 < layer.rtn_error[4] < layer.rtn_error[3] < layer.rtn_error[2]


def test_sites_are_listed_with_their_layers(record: InspectRecord) -> None:
    sites = {layer.name: layer.sites for layer in record.layers}
    for block in range(2):
        for name, producer in (("self_attn.q_proj", "input_layernorm"), ("mlp.down_proj", "up_proj")):
            found = sites[f"model.layers.{block}.{name}"]
            assert any(producer in site for site in found), (name, found)


def test_the_model_is_not_changed(model: nn.Module, tokens: Tensor, record: InspectRecord) -> None:
    before = copy.deepcopy(model.state_dict())
    inspect(model, tokens[:1], group=None, tokenizer=tiny_folder.tokenizer())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert record.model == "LlamaForCausalLM" and record.calibration.text == "given tokens"
    assert (record.calibration.windows, record.calibration.length) == (6, 24) and record.scheme.endswith("group 16")


def test_any_torch_module(tmp_path: Path) -> None:
    model, sample = tiny_models.build("vit")
    record = InspectRecord.model_validate(inspect(model, [sample], group=None))
    assert record.layers and all(layer.rtn_error for layer in record.layers)
    assert record.calibration.describe() == "given model inputs" and record.scheme.endswith("one scale a row")


def test_folders_and_text(tmp_path: Path) -> None:
    tiny_folder.save(tmp_path / "model")
    (tmp_path / "text.txt").write_text(tiny_folder.text())
    facts: dict[str, Any] = inspect(tmp_path / "model", tmp_path / "text.txt", group=16, samples=2, length=16)
    record = InspectRecord.model_validate(facts)
    assert record.calibration.describe() == "text.txt, 2 windows of 16 tokens" and len(record.layers) == 14
    with pytest.raises(ModelError):
        inspect(tmp_path / "nothing")


def test_kurtosis() -> None:
    x = torch.randn(200_000, generator=torch.Generator().manual_seed(0))
    assert kurtosis(x) == pytest.approx(3.0, abs=0.05)
    assert kurtosis(torch.tensor([-1.0, 1.0])) == pytest.approx(1.0)
    assert kurtosis(torch.ones(4)) is None
