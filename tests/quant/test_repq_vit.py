"""RepQ-ViT: the identities of its reparameterization in float64, the few-bit model against the paper's formulas written out, checkpoints, resume."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import dither
import tiny_models
from dither import graph
from dither.errors import CheckpointError, ModelError, SiteError, UsageError
from dither.formats import Int, channel
from dither.quant import attention_inputs
from dither.quant.inputs import InputRounding
from dither.quant.linear import QuantLinear
from dither.quant.parts import BlockView
from dither.quant.recipe import Chain
from dither.quant.recipes import GPTQ, RepQViT, build, parse
from dither.quant.statistics import ROWS, Statistics
from dither.quant.transforms.reparameterise import Reparameterise, channel_grids

GENERATOR = torch.Generator().manual_seed(0)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def images(count: int = 16, size: int = 4) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(count + size))


def vit(seed: int = 0, *, uneven: bool = True, **settings: Any) -> nn.Module:
    """Big enough to be streamed block by block. ``uneven``: norms whose channels differ in range and place, as trained ones do."""
    given = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4} | settings
    given |= {"image_size": 4, "patch_size": 2}
    return prepared(hf.ViTForImageClassification(hf.ViTConfig(num_labels=5, **given)), seed, uneven)


def prepared(model: nn.Module, seed: int, uneven: bool) -> nn.Module:
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() > 1:
                p.copy_(torch.randn(p.shape, generator=g) / p.shape[-1] ** 0.5)
            elif name.endswith("bias"):
                p.copy_(torch.randn(p.shape, generator=g) * 0.3)
            elif uneven:
                p.copy_(torch.exp(torch.randn(p.shape, generator=g)))
    return model.eval()


def error(model: nn.Module, reference: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        a, b = model(x).logits, reference(x).logits
    return float((a - b).square().mean() / b.square().mean())


def view_of(model: nn.Module, x: Tensor, **sample: Any) -> BlockView:
    """The whole model as one block, in its own type, with statistics of every layer's input."""
    given = sample or {"pixel_values": x}
    structure = graph.discover(model, {k: v[:2] for k, v in given.items()})
    chosen = [layer.name for layer in structure.layers if layer.kind == "linear" and layer.out_features >= 16]
    statistics: dict[str, Statistics] = {}
    handles = []
    for names in structure.groups(chosen):
        shared = Statistics(model.get_submodule(names[0]).in_features, frozenset({ROWS}))  # type: ignore[arg-type]
        statistics |= dict.fromkeys(names, shared)
        handles.append(model.get_submodule(names[0]).register_forward_pre_hook(lambda m, a, s=shared: s.update(a[0])))
    with torch.no_grad():
        model(**given)
    for handle in handles:
        handle.remove()
    return BlockView(0, "model", model, structure, statistics, {n: Int(4) @ channel() for n in chosen}, torch.float64, {}, samples=len(x))


def inputs_of(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """What every linear layer reads, float64."""
    seen: dict[str, Tensor] = {}
    handles = [
        m.register_forward_pre_hook(lambda _, a, n=n: seen.__setitem__(n, a[0].detach().flatten(0, -2)))
        for n, m in model.named_modules()
        if isinstance(m, nn.Linear)
    ]
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    return seen


# -- the identities ----------------------------------------------------------------------------------------------------------


def test_codes_are_the_same_integers_and_outputs_equal() -> None:
    """The equations, written out in float64 on random X, W, b."""
    g = torch.Generator().manual_seed(3)
    x = torch.randn(500, 24, generator=g, dtype=torch.float64) * torch.logspace(-2, 1, 24, dtype=torch.float64) + torch.randn(24, generator=g) * 5
    w, b = torch.randn(7, 24, generator=g, dtype=torch.float64), torch.randn(7, generator=g, dtype=torch.float64)
    for bits in (2, 4, 6, 8):
        grids = channel_grids(x, bits)
        s, z, top = grids.scale, grids.zero, 2**bits - 1
        assert torch.equal(z, z.round()) and grids.layer_zero == round(grids.layer_zero)
        assert grids.layer_scale == pytest.approx(float(s.mean()), rel=1e-6) and grids.layer_zero == round(float(z.mean()))
        r1, r2 = s / grids.layer_scale, z - grids.layer_zero
        before = ((x / s).round() + z).clamp(0, top)
        moved, w2, b2 = (x + s * r2) / r1, w * r1, b - w @ (s * r2)
        after = ((moved / grids.layer_scale).round() + grids.layer_zero).clamp(0, top)
        assert torch.equal(before, after)
        left = (s * (before - z)) @ w.T + b
        right = (grids.layer_scale * (after - grids.layer_zero)) @ w2.T + b2
        assert torch.allclose(left, right, atol=1e-9)
        assert torch.allclose(x @ w.T + b, moved @ w2.T + b2, atol=1e-9)


@pytest.mark.parametrize("name", ["vit", "swin"])
def test_every_norm_site_of_a_model(name: str) -> None:
    """Float outputs unchanged to 1e-9; at every site the same integers from the edited norm on one grid as from the norm on its channels' grids."""
    model, sample = tiny_models.build(name)
    model = prepared(model, 1, uneven=True).double()
    x = sample["pixel_values"].double()
    with torch.no_grad():
        reference, before = model(x).logits, inputs_of(model, x)
    view = view_of(model, x)
    rows = {n: s.rows.clone() for n, s in view.statistics.items()}
    Reparameterise(bits=4).apply(view)
    with torch.no_grad():
        assert float((model(x).logits - reference).abs().max() / reference.abs().max()) < 1e-9
    after = inputs_of(model, x)
    expected = {"vit": 8, "swin": 17}[name]  # q, k, v and fc1 of each block, and the reduction between stages
    assert len(view.inputs) == expected and len(view.findings) == {"vit": 4, "swin": 9}[name]
    for layer, quant in view.inputs.items():
        grids = channel_grids(rows[layer], 4)
        codes = ((before[layer] / grids.scale).round() + grids.zero).clamp(0, 15)
        assert quant.params is not None and quant.params["scale"].shape == (1, 1)
        one = quant.scheme.encode(after[layer], {k: v.double() for k, v in quant.params.items()})  # type: ignore[attr-defined]
        assert torch.equal(one.double(), codes)
        assert torch.allclose(view.statistics[layer].rows.double(), ((rows[layer].double() + grids.shift) / grids.r1), atol=1e-3)
    if name == "swin":
        reduction = model.get_submodule("swin.encoder.layers.0.downsample.reduction")
        assert reduction.bias is not None  # it had none


def test_a_constant_channel_keeps_its_value_through_the_bias() -> None:
    model = vit().double()
    norm = model.vit.layers[1].layernorm_before
    with torch.no_grad():
        norm.weight[5], norm.bias[5] = 0, 3.0
    x = images().double()
    with torch.no_grad():
        reference = model(x).logits
    view = view_of(model, x)
    Reparameterise(bits=4).apply(view)
    with torch.no_grad():
        assert float((model(x).logits - reference).abs().max()) < 1e-7
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())
    finding = next(f for f in view.findings if "layers.1.layernorm_before" in f["site"])
    assert abs(finding["zero_point"]) < 100 and finding["r1_min"] < 1e-6
    quant, seen = view.inputs["vit.layers.1.attention.q_proj"], inputs_of(model, x)["vit.layers.1.attention.q_proj"]
    rounded = quant.scheme.quantize(seen, {k: v.double() for k, v in (quant.params or {}).items()})
    lost = (rounded - seen)[:, 5] * model.get_submodule("vit.layers.1.attention.q_proj").weight.detach()[:, 5].abs().max()
    assert float(lost.abs().max()) < 1e-6


def test_a_planted_outlier_channel_changes_nothing_and_ruins_per_tensor_rounding() -> None:
    """gamma_j, beta_j times 100 and W's column by 1/100: the same float model."""
    x, plain = images(32), vit(uneven=False)
    planted = copy.deepcopy(plain)
    with torch.no_grad():
        for layer in planted.vit.layers:
            for norm, readers in ((layer.layernorm_before, ["q_proj", "k_proj", "v_proj"]), (layer.layernorm_after, ["fc1"])):
                norm.weight[3] *= 100
                norm.bias[3] *= 100
                for name, m in layer.named_modules():
                    if name.rpartition(".")[2] in readers:
                        m.weight[:, 3] /= 100
    assert error(planted, plain, x) < 1e-8
    ours = RepQViT(bits=8, act_bits=8, scale="float32")
    naive = RepQViT(bits=8, act_bits=8, scale="float32", search="minmax", reparameterise=False, softmax="uniform")
    found = {}
    for label, model in (("plain", plain), ("planted", planted)):
        for kind, recipe in (("ours", ours), ("naive", naive)):
            quantized = dither.quantize(model, recipe, x, compute=torch.float32).model
            found[label, kind] = (error(quantized, plain, x), quantized)
    assert error(found["planted", "ours"][1], found["plain", "ours"][1], x) < 0.2 * found["plain", "ours"][0]
    assert found["planted", "ours"][0] == pytest.approx(found["plain", "ours"][0], rel=0.1)
    assert found["planted", "naive"][0] > 20 * found["plain", "naive"][0]


def test_without_a_shift_grids_are_symmetric() -> None:
    """Norms without a bias: only r1, and a layer grid that has 0 in its middle."""
    model, sample = tiny_models.build("llama")
    model = prepared(model, 2, uneven=True).double()
    with torch.no_grad():
        reference = model(**sample).logits
    view = view_of(model, sample["input_ids"], **sample)
    Reparameterise(bits=6).apply(view)
    with torch.no_grad():
        assert float((model(**sample).logits - reference).abs().max() / reference.abs().max()) < 1e-9
    assert view.findings and all(f["symmetric"] and f["zero_point"] == 0 for f in view.findings)
    assert all("zero_point" not in (quant.params or {}) for quant in view.inputs.values())
    kinds = RepQViT(bits=8, act_bits=8, softmax="uniform")
    assert len(dither.quantize(model.float(), kinds, sample["input_ids"], compute=torch.float32).report.layers) == 14


def test_statistics_after_a_shift() -> None:
    x, delta = torch.randn(200, 6, generator=GENERATOR) + 2, torch.randn(6, generator=GENERATOR)
    found, direct = (Statistics(6, frozenset({"rows", "hessian", "mean"})) for _ in range(2))
    found.update(x)
    found.shift(delta)
    found.rescale(torch.full((6,), 0.5))
    direct.update((x - delta) / 0.5)
    assert torch.allclose(found.rows, direct.rows, atol=1e-5)
    assert torch.allclose(found.hessian, direct.hessian, atol=1e-4)


# -- the few-bit model -------------------------------------------------------------------------------------------------------


def rounded(x: Tensor, module: Any) -> Tensor:
    """The affine grid of stored parameters, written out."""
    s, z, top = module.scale.flatten(), module.zero_point.flatten(), 2**module.scheme.format.bits - 1
    return s * (((x / s).round() + z).clamp(0, top) - z)


@pytest.mark.parametrize("softmax", ["log_sqrt2", "log2", "uniform", None])
def test_an_attention_layer_is_the_papers_formulas(softmax: Any) -> None:
    model = vit()
    result = dither.quantize(model, RepQViT(bits=4, act_bits=4, softmax=softmax), images(), compute=torch.float32)
    layer = result.model.vit.layers[1].attention
    assert isinstance(layer.q_proj, QuantLinear) and isinstance(layer.q_proj.inputs, InputRounding)
    x = torch.randn(3, 5, 64, generator=GENERATOR)

    def linear(name: str, x: Tensor) -> Tensor:
        module = layer.get_submodule(name)
        return rounded(x, module.inputs) @ module.weight.T + module.bias

    held = layer.operands
    q, k, v = (linear(f"{n}_proj", x).view(3, 5, 4, 16).transpose(1, 2) for n in "qkv")
    a = (rounded(q, held.q) @ rounded(k, held.k).transpose(2, 3) / 4).softmax(-1)
    if softmax == "uniform":
        a = rounded(a, held.probabilities)
    elif softmax is None:
        assert "probabilities" not in dict(held.named_children())
    else:
        root, s = (2 if softmax == "log_sqrt2" else 1), held.probabilities.scale
        codes = (-root * torch.log2(a / s)).round()
        a = torch.where(codes >= 16, torch.zeros(()), s * 2 ** (-codes.clamp(0, 15) / root))
    expected = linear("o_proj", (a @ rounded(v, held.v)).transpose(1, 2).reshape(3, 5, 64))
    with torch.no_grad():
        assert torch.allclose(layer(x)[0], expected, atol=1e-4)


def test_better_than_per_tensor_and_better_with_more_bits() -> None:
    model, x = vit(), images(32)
    errors = {}
    for bits in (3, 4, 6):
        for name, recipe in (
            ("full", RepQViT(bits=bits, act_bits=bits)),
            ("per tensor", RepQViT(bits=bits, act_bits=bits, reparameterise=False, softmax="uniform", search="minmax")),
        ):
            errors[name, bits] = error(dither.quantize(model, recipe, x, compute=torch.float32).model, model, x)
    assert errors["full", 6] < errors["full", 4] < errors["full", 3]
    assert errors["full", 3] < errors["per tensor", 3] and errors["full", 4] < 0.7 * errors["per tensor", 4]


@pytest.mark.parametrize("name", ["vit", "swin", "deit"])
def test_save_and_load(name: str, tmp_path: Path) -> None:
    """From disk through transformers, as in memory; what is saved again loads again."""
    if name == "deit":
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 4, "patch_size": 2}
        model, x = prepared(hf.DeiTForImageClassification(hf.DeiTConfig(num_labels=5, **sizes)), 0, True), images()
    else:
        built, sample = tiny_models.build(name)
        model, x = prepared(built, 0, True), images(16, sample["pixel_values"].shape[-1])
    model.save_pretrained(tmp_path / "model")
    recipe = RepQViT(bits=4, act_bits=6)
    held = None if name == "swin" else dither.quantize(tmp_path / "model", recipe, x, compute=torch.float32).model
    stored = dither.quantize(tmp_path / "model", recipe, x, tmp_path / "out", compute=torch.float32)
    count = {"vit": 2, "swin": 4, "deit": 2}[name]
    around = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]["around"]
    assert len(around["attention"]) == count and all(set(r) == set(attention_inputs.OPERANDS) for r in around["attention"].values())
    loaded = hf.AutoModelForImageClassification.from_pretrained(tmp_path / "out")
    loaded.save_pretrained(tmp_path / "again")
    again = hf.AutoModelForImageClassification.from_pretrained(tmp_path / "again")
    with torch.no_grad():
        outputs = [m(x).logits for m in (held, stored.model, loaded, again) if m is not None]
    assert all(torch.equal(outputs[0], other) for other in outputs[1:])
    assert 0 < error(loaded, model, x) < 1
    assert sum(1 for m in loaded.modules() if isinstance(m, attention_inputs.Operands)) == count
    if name == "swin":
        assert loaded.get_submodule("swin.encoder.layers.0.downsample.reduction").bias is not None


class Stopped(Exception):
    pass


@pytest.mark.parametrize("bias", [True, False])
def test_a_stopped_run_goes_on_to_the_same_bytes(bias: bool, tmp_path: Path) -> None:
    model, x = vit(qkv_bias=bias), images()
    model.save_pretrained(tmp_path / "model")
    recipe = Chain(RepQViT(bits=4, act_bits=4, round=False), GPTQ(bits=4, group=None))  # GPTQ: the rounded stream must pass finished blocks

    def stop(event: Any) -> None:
        if event.done == 2:
            raise Stopped

    with pytest.raises(Stopped):
        dither.quantize(tmp_path / "model", recipe, x, tmp_path / "a", progress=stop)
    resumed = dither.quantize(tmp_path / "model", recipe, x, tmp_path / "a")
    whole = dither.quantize(tmp_path / "model", recipe, x, tmp_path / "b")
    assert resumed.report.resumed_blocks == 2 and not any("whole" in note for note in whole.report.notes)
    for name in ("model.safetensors", "config.json", "dither.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert (resumed.model.vit.layers[0].attention.k_proj.bias is not None) and error(resumed.model, model, x) < 1
    assert all(row.inputs is not None for row in whole.report.layers)


def test_fine_grids_leave_the_float_model() -> None:
    """Everything at 8 bits but the probabilities: what is left of the error is small, so nothing is lost on the way."""
    model, x = vit(uneven=False), images(32)
    recipe = RepQViT(bits=8, act_bits=8, softmax="uniform", search="minmax")
    assert error(dither.quantize(model, recipe, x, compute=torch.float32).model, model, x) < 1e-3


def test_weights_only() -> None:
    model = vit()
    result = dither.quantize(model, RepQViT(bits=4, act_bits=None), images())
    assert all(row.inputs is None for row in result.report.layers) and not hasattr(result.model.vit.layers[0].attention, "operands")


def test_what_lies_outside_the_blocks_by_override() -> None:
    overrides = {"vit.embeddings*projection": Int(8) @ channel(), "classifier": Int(8) @ channel()}
    model, x = vit(), images()
    result = dither.quantize(model, RepQViT(bits=4, act_bits=None, overrides=overrides), x)
    names = [row.name for row in result.report.layers]
    assert "classifier" in names and "vit.embeddings.patch_embeddings.projection" in names
    plain = dither.quantize(model, RepQViT(bits=4, act_bits=None), x)
    assert 0 < error(result.model, plain.model, x) < 1e-2


def test_the_report_tells() -> None:
    report = dither.quantize(vit(), RepQViT(), images()).report
    sites = [f for f in report.sites if "ratio" in f]
    sums = [f for f in report.sites if "row_sum" in f]
    assert len(sites) == 6 and all(f["ratio"] > 1 and f["rows"] == 16 * 5 for f in sites)
    assert len(sums) == 3 and all(0.8 < f["row_sum"] < 1.25 and f["rows"] == 16 * 4 * 5 for f in sums)


def test_attention_that_cannot_be_seen_is_told() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))
    report = dither.quantize(net, RepQViT(), [{"input": torch.randn(64, 32)}]).report
    assert any("no attention goes through" in note for note in report.notes)
    assert [row.inputs for row in report.layers] == ["int4 asymmetric float32 scales tensor"] * 2


# -- attention ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", [None, "causal", "bool", "added"])
@pytest.mark.parametrize("heads", [4, 2])
def test_without_quantizers_it_is_torchs_attention(mask: str | None, heads: int) -> None:
    q, k, v = torch.randn(2, 4, 7, 8), torch.randn(2, heads, 7, 8), torch.randn(2, heads, 7, 8)
    module = nn.Module().eval()
    module.is_causal = mask == "causal"  # type: ignore[assignment]
    seen = {None: None, "causal": None, "bool": torch.rand(2, 1, 7, 7) > 0.2, "added": torch.randn(2, 1, 7, 7)}[mask]
    if mask == "bool":
        seen[..., 0] = True  # type: ignore[index]
    ours, weights = attention_inputs.operand_attention(module, q, k, v, seen)
    wide = [x.repeat_interleave(4 // heads, 1) for x in (k, v)]
    theirs = nn.functional.scaled_dot_product_attention(q, *wide, attn_mask=seen, is_causal=mask == "causal")
    assert torch.allclose(ours, theirs.transpose(1, 2), atol=1e-5) and torch.allclose(weights.sum(-1), torch.ones(2, 4, 7))


def test_another_attention_is_refused_at_run_time() -> None:
    model = dither.quantize(vit(), RepQViT(), images()).model
    model.set_attn_implementation("sdpa")
    with pytest.raises(ModelError, match="did not round its operands"):
        model(images(2))


def test_damaged_records(tmp_path: Path) -> None:
    dither.quantize(vit(), RepQViT(), images(), tmp_path / "out")
    path = tmp_path / "out/config.json"
    good = json.loads(path.read_text())
    name = next(iter(good["quantization_config"]["around"]["attention"]))
    for change in (
        lambda a: a.__setitem__(name, {"bias": a[name]["q"]}),
        lambda a: a.__setitem__(name, {}),
        lambda a: a[name]["q"].pop("scheme"),
        lambda a: a.__setitem__("vit.nowhere", a[name]),
    ):
        config = copy.deepcopy(good)
        change(config["quantization_config"]["around"]["attention"])
        path.write_text(json.dumps(config))
        with pytest.raises(CheckpointError):
            dither.load(tmp_path / "out")


# -- calls and errors --------------------------------------------------------------------------------------------------------


def test_calibration() -> None:
    model = vit()
    few = dither.quantize(model, RepQViT(), images(7)).report
    assert any("7 samples only" in note for note in few.notes)
    assert not any("samples only" in note for note in dither.quantize(model, RepQViT(), images(8)).report.notes)
    for nothing in (images(8)[:0], [{"pixel_values": images(8)[:0]}]):
        with pytest.raises(ValueError, match=r"no images|no samples"):
            dither.quantize(model, RepQViT(), nothing)
    with pytest.raises(UsageError, match="takes images"):
        dither.quantize(model, RepQViT())
    bad = images(8)
    bad[0, 0, 0, 0] = float("nan")
    with pytest.raises((ValueError, dither.errors.DitherError), match="finite"):
        dither.quantize(model, RepQViT(), bad)
    with pytest.raises(ValueError, match="NaN or inf"):
        dither.quantize(model, RepQViT(), [{"pixel_values": bad}])


def test_wrong_knobs() -> None:
    for wrong in ({"bits": 1}, {"bits": 9}, {"act_bits": 1}, {"act_bits": 9}, {"kv_bits": 4}, {"act_group": 16}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            RepQViT(**wrong).recipe()  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="softmax"):
        build("repq-vit", {"softmax": "log3"})
    assert parse({"method": "repq-vit", "bits": 6, "act_bits": 6, "softmax": "log2"}) == RepQViT(bits=6, act_bits=6, softmax="log2")
    assert build("repq-vit", {"softmax": None}) == RepQViT(softmax=None)


def test_no_site_is_an_error() -> None:
    """Where the norm's output is also the residual, nothing can be folded."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64}
    model, sample = hf.BertModel(hf.BertConfig(vocab_size=96, **sizes), add_pooling_layer=False).eval(), {"input_ids": tiny_models.ids()}
    with pytest.raises(SiteError, match="reparameterise"):
        dither.quantize(model, RepQViT(), [sample])
    report = dither.quantize(model, RepQViT(reparameterise=False, softmax="log2"), [sample]).report
    assert all(row.inputs is not None for row in report.layers)


def test_runs_repeat() -> None:
    model, x = vit(), images(40)
    first, second = (dither.quantize(model, RepQViT(), x, seed=1).model.state_dict() for _ in range(2))
    assert first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)
