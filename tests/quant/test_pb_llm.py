"""PB-LLM against its exact checks (../shared/specs/quant/pb-llm.md) and from end to end."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dither
import tiny_folder
import tiny_models
from dither.errors import CheckpointError, ExportError, UsageError
from dither.formats import Int, PartialBinary, QTensor, channel, group
from dither.formats.packing import unpack_rows, unpack_stream
from dither.quant.linear import QuantLinear
from dither.quant.recipes import PBLLM, build, read
from dither.quant.rounding.columns import Columns, damped_inverse_factor
from dither.quant.rounding.partial_binary import (
    PartialBinaryColumns,
    PartialBinaryNearest,
    binary_fit,
    partial_binary,
    row_errors,
)
from dither.quant.saliency import saliency
from kernels.problems import factor, hessian

TOKENS = torch.randint(3, tiny_models.VOCABULARY, (8, 24), generator=torch.Generator().manual_seed(0))


def problem(rows: int = 40, columns: int = 96, seed: int = 0) -> tuple[Tensor, Tensor]:
    """``W [O, I]`` float32 and an undamped Hessian of correlated inputs, float64."""
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)), hessian(columns, seed, damp=0)


def damped(h: Tensor, damp: float = 0.01) -> Tensor:
    found = h.clone()
    found.diagonal().add_(damp * h.diagonal().mean())
    return found


def exact(tensor: QTensor) -> Tensor:
    """The values of stored tensors in float64 (layers compute them in float32)."""
    scheme, stored, (rows, columns) = tensor.scheme, tensor.stored, tensor.shape
    assert isinstance(scheme, PartialBinary)
    binary, plane = scheme.binary_of(stored, tensor.shape), unpack_rows(stored["signs"], 1, columns).double()
    index = scheme.column_groups(columns)
    values = (stored["mu"].double()[:, index] + stored["alpha"].double()[:, index] * (2 * plane - 1))
    if bool(binary.all()):
        return values
    codes = plane * 2 ** (scheme.high_bits - 1)
    codes[~binary] += unpack_stream(stored["codes"], scheme.high_bits - 1, int((~binary).sum())).double()
    zero = unpack_stream(stored["zero_point"], scheme.high_bits, rows).double()
    return torch.where(binary, values, stored["scale"].double()[:, None] * (codes - zero[:, None]))


# -- the exact checks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("high_bits", [4, 8])
def test_1_all_salient_is_gptq_to_the_bit(high_bits: int, act_order: bool) -> None:
    w, h = problem()
    mine = PartialBinaryColumns(act_order=act_order).solve(w, h, PartialBinary(1, high_bits))
    theirs = Columns(act_order=act_order).solve(w, h, Int(high_bits) @ channel())
    assert torch.equal(mine.tensor.dequantize(), theirs.tensor.dequantize()) and mine.loss == theirs.loss
    assert torch.equal(mine.tensor.stored["scale"], theirs.tensor.stored["scale"][:, 0])
    assert torch.equal(mine.tensor.stored["zero_point"], theirs.tensor.stored["zero_point"])


@pytest.mark.parametrize("salient", [0.0, 0.1, 0.5])
@pytest.mark.parametrize(("act_order", "groups"), [(False, None), (True, None), (True, 32)])
def test_2_loss_identity(salient: float, act_order: bool, groups: int | None) -> None:
    """``sum e^2 = tr((W - Q) H (W - Q)^T)`` with the damped Hessian, in float64 to 1e-9."""
    w, h = problem()
    w = w.double()
    found = PartialBinaryColumns(act_order=act_order).solve(w, h, PartialBinary(salient, group=groups))
    d = w - exact(found.tensor)
    assert found.loss == pytest.approx(float(row_errors(d, damped(h)).sum()) / 2, rel=1e-9)


@pytest.mark.parametrize("stats", ["masked", "lloyd"])
def test_3_alpha_is_where_the_derivative_is_zero(stats: str) -> None:
    g = torch.Generator().manual_seed(3)
    w = torch.randn(30, 120, generator=g, dtype=torch.float64).exp()  # skewed
    binary = torch.rand(30, 120, generator=g) < 0.8
    alpha, mu = binary_fit(w, binary, stats, 40)
    spread, level = alpha.repeat_interleave(40, 1), mu.repeat_interleave(40, 1)
    b = torch.where(w >= level, 1.0, -1.0).double()
    if stats == "masked":
        slope = (torch.where(binary, (w - level - spread * b) * b, 0)).view(30, 3, 40).sum(2)
        assert float(slope.abs().max()) < 1e-10
        torch.testing.assert_close(mu, torch.where(binary, w, 0).view(30, 3, 40).sum(2) / binary.view(30, 3, 40).sum(2))
    error = torch.where(binary, (w - level - spread * b).square(), 0).view(30, 3, 40).sum(2)
    plain = binary_fit(w, binary, "masked", 40)
    lifted = torch.where(w >= plain[1].repeat_interleave(40, 1), 1.0, -1.0).double() * plain[0].repeat_interleave(40, 1)
    before = torch.where(binary, (w - plain[1].repeat_interleave(40, 1) - lifted).square(), 0).view(30, 3, 40).sum(2)
    assert bool((error <= before + 1e-12).all())


@pytest.mark.parametrize("salient", [0.1, 0.3, 0.5])
def test_3_masked_is_never_worse_than_reference_in_the_weights(salient: float) -> None:
    w = torch.randn(200, 300, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    binary = PartialBinary(salient).choose(w.abs())
    errors = {}
    for stats in ("masked", "reference"):
        alpha, mu = binary_fit(w, binary, stats)
        errors[stats] = torch.where(binary, (w - mu - alpha * torch.where(w >= mu, 1, -1)).square(), 0).sum(1)
    assert bool((errors["masked"] <= errors["reference"]).all())


def test_3_reference_stats_are_the_authors_formula() -> None:
    w = torch.randn(20, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    binary = PartialBinary(0.4).choose(w.abs())
    alpha, mu = binary_fit(w, binary, "reference")
    for row in range(20):
        own = w[row][binary[row]]
        middle = own.sum() / 50
        assert mu[row, 0] == pytest.approx(float(middle), rel=1e-12)
        assert alpha[row, 0] == pytest.approx(float(((own - middle).abs().sum() + (50 - len(own)) * middle.abs()) / 50), rel=1e-12)


def test_5_gaussian_rows() -> None:
    """alpha = sqrt(2 / pi) sigma and error (1 - 2 / pi) sigma^2; without the largest 10 %: 0.6573 sigma and 0.1909 sigma^2."""
    w = torch.randn(1, 2_000_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for salient, alpha, error in ((0.0, math.sqrt(2 / math.pi), 1 - 2 / math.pi), (0.1, 0.6573, 0.1909)):
        binary = PartialBinary(salient).choose(w.abs())
        found, mu = binary_fit(w, binary)
        rest = w[binary]
        assert float(found) == pytest.approx(alpha, abs=1.5e-3) and abs(float(mu)) < 2e-3
        assert float((rest - mu - found * torch.where(rest >= mu, 1, -1)).square().mean()) == pytest.approx(error, abs=1.5e-3)


@pytest.mark.parametrize("salient", [0.05, 0.3])
@pytest.mark.parametrize("groups", [None, 32])
def test_7_packed_product_is_the_dense_one(salient: float, groups: int | None) -> None:
    """``y = alpha (2 X_+ - X_B) + mu X_B + sum over salient w x``, from the stored planes, and what the layer computes from them."""
    w, h = problem()
    tensor = partial_binary(w, h, PartialBinary(salient, group=groups))
    x = torch.randn(5, 96, generator=torch.Generator().manual_seed(1))
    dense = x @ tensor.dequantize().T
    torch.testing.assert_close(QuantLinear.replace(tensor, None)(x), dense, rtol=1e-5, atol=1e-5)

    scheme = tensor.scheme
    assert isinstance(scheme, PartialBinary)
    stored, binary = tensor.stored, scheme.binary_of(tensor.stored, tensor.shape)
    plane = unpack_rows(stored["signs"], 1, 96).bool()
    rest = unpack_stream(stored["codes"], 7, int((~binary).sum())).float()
    zero, scale, offsets = unpack_stream(stored["zero_point"], 8, 40), stored["scale"].float(), stored["offsets"].to(torch.int64)
    y = torch.zeros(5, 40)
    width = groups or 96
    for o in range(40):
        for g in range(96 // width):
            inside = (torch.arange(96) // width == g) & binary[o]
            x_b, x_up = x[:, inside].sum(1), x[:, inside & plane[o]].sum(1)
            alpha, mu = stored["alpha"][o, g].float(), stored["mu"][o, g].float()
            y[:, o] += alpha * (2 * x_up - x_b) + mu * x_b
        places = (~binary[o]).nonzero()[:, 0]
        codes = rest[offsets[o] : offsets[o] + len(places)] + 128 * plane[o, places]
        y[:, o] += x[:, places] @ (scale[o] * (codes - zero[o]))
    torch.testing.assert_close(y, dense, rtol=1e-5, atol=1e-4)


# -- what the parts do ------------------------------------------------------------------------------------------------------------


def test_saliency_is_what_leaving_a_weight_out_costs() -> None:
    """``w_c^2 / U_cc^2`` is the least ``d H d^T`` over changes d of w_c.. that set weight c to zero (those before it stay)."""
    h = hessian(12, 0)
    u = factor(h)
    w = torch.randn(3, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    values = saliency(w, u)
    for c in range(12):
        inverse = torch.linalg.inv(h[c:, c:])
        torch.testing.assert_close(values[:, c], w[:, c].square() / inverse[0, 0], rtol=1e-9, atol=0)
    assert torch.equal(saliency(w, metric="magnitude"), w.abs())
    for wrong in (lambda: saliency(w), lambda: saliency(w, u[:5, :5]), lambda: saliency(w, u, "importance")):
        with pytest.raises(ValueError):
            wrong()


def test_mask_and_levels_are_of_the_original_weight() -> None:
    """Updates in the column loop change neither."""
    w, h = problem()
    scheme = PartialBinary(0.2)
    u, _ = damped_inverse_factor(h, 0.01)
    tensor = partial_binary(w, h, scheme)
    binary = scheme.choose((w.double() / u.diagonal()).square().float())
    assert torch.equal(scheme.binary_of(tensor.stored, tensor.shape), binary)
    alpha, mu = binary_fit(w, binary)
    assert torch.equal(tensor.stored["alpha"], alpha.half()) and torch.equal(tensor.stored["mu"], mu.half())


def test_without_compensation_each_weight_is_rounded_alone() -> None:
    w, h = problem()
    scheme = PartialBinary(0.2)
    plain = partial_binary(w, None, scheme, metric="magnitude", compensate=False)
    assert torch.equal(plain.dequantize(), partial_binary(w, h, scheme, metric="magnitude", compensate=False).dequantize())
    binary = scheme.choose(w.abs())
    alpha, mu = (x.half().float() for x in binary_fit(w, binary))
    two = torch.where(w >= mu, mu + alpha, mu - alpha)
    assert torch.equal(plain.dequantize(), torch.where(binary, two, (Int(8) @ channel()).quantize(w)))


def test_permuting_inputs_permutes_the_result_under_act_order() -> None:
    w, h = problem()
    order = torch.randperm(96, generator=torch.Generator().manual_seed(7))
    plain = partial_binary(w, h, PartialBinary(0.2), act_order=True).dequantize()
    moved = partial_binary(w[:, order].contiguous(), h[order][:, order].contiguous(), PartialBinary(0.2), act_order=True).dequantize()
    same = (plain[:, order] == moved).float().mean()
    assert same > 0.999  # means of a row are summed in another order


def test_inputs_that_were_always_zero_are_least_salient() -> None:
    w, h = problem()
    h[5], h[:, 5] = 0, 0
    w[:, 5] = 100
    tensor = partial_binary(w, h, PartialBinary(0.3))
    scheme = tensor.scheme
    assert isinstance(scheme, PartialBinary)
    assert bool(scheme.binary_of(tensor.stored, tensor.shape)[:, 5].all())
    assert float(tensor.dequantize()[:, 5].abs().max()) < 10


@pytest.mark.parametrize("compensate", [True, False])
def test_refits_lower_every_rows_error(compensate: bool) -> None:
    w, h = problem()
    scheme = PartialBinary(0.1)
    errors = []
    for refits in (0, 1, 3):
        tensor = partial_binary(w, h, scheme, compensate=compensate, refits=refits)
        errors.append(row_errors(w.double() - tensor.dequantize().double(), damped(h)))
    for before, after in pairwise(errors):
        assert bool((after <= before * (1 + 1e-6)).all())
    assert float(errors[1].sum()) < 0.97 * float(errors[0].sum())


@pytest.mark.parametrize("groups", [None, 32])
def test_one_refit_is_the_least_squares_solution(groups: int | None) -> None:
    """With codes as they are, (alpha, mu) solve ``min ||L^T (A u - r)||`` row by row, L the Cholesky factor of H."""
    w, h = problem(rows=6)
    part = PartialBinaryColumns(compensate=False, refits=1)
    scheme = PartialBinary(0.2, group=groups)
    before = part.solve(w, h, scheme).tensor
    plain = PartialBinaryColumns(compensate=False).solve(w, h, scheme).tensor
    binary = scheme.binary_of(plain.stored, plain.shape)
    lower = torch.linalg.cholesky(damped(h))
    index = scheme.column_groups(96)
    for o in range(6):
        b = torch.where(w[o] >= plain.stored["mu"][o].float()[index], 1.0, -1.0).double() * binary[o]
        columns = [b * (index == g) for g in range(int(index.max()) + 1)] + [binary[o].double() * (index == g) for g in range(int(index.max()) + 1)]
        salient = torch.where(binary[o], 0.0, plain.dequantize()[o].double())
        u = torch.linalg.lstsq(lower.T @ torch.stack(columns, 1), lower.T @ (w[o].double() - salient)).solution
        found = torch.cat([before.stored["alpha"][o], before.stored["mu"][o]]).double()
        torch.testing.assert_close(found, u, rtol=2e-3, atol=2e-3)


def test_compensation_and_salient_weights_help() -> None:
    w, h = problem(columns=128)
    full, h_damped = w.double(), damped(h)

    def error(salient: float, **knobs: Any) -> float:
        return float(row_errors(full - partial_binary(w, h, PartialBinary(salient), **knobs).dequantize().double(), h_damped).sum())

    by_share = [error(s) for s in (0.0, 0.1, 0.3, 0.5, 1.0)]
    assert by_share == sorted(by_share, reverse=True)
    for s in (0.1, 0.3, 0.5):
        assert error(s) < error(s, compensate=False)


def test_wrong_knobs_and_schemes() -> None:
    w, h = problem()
    for knobs in ({}, {"metric": "magnitude"}, {"metric": "magnitude", "compensate": False, "refits": 1}):
        with pytest.raises(ValueError, match=r"^hessian: "):
            partial_binary(w, None, PartialBinary(0.1), **knobs)  # type: ignore[arg-type]
    for name, wrong in (("metric", "size"), ("stats", "mean"), ("refits", -1), ("damp", 0.0), ("block", 0)):
        with pytest.raises(ValueError, match=f"^{name} must"):
            PartialBinaryColumns(**{name: wrong})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^group: 7 does not divide"):
        partial_binary(w, h, PartialBinary(0.1, group=7))
    assert PartialBinaryNearest().refuses(Int(4) @ group(16)) is not None
    assert PartialBinaryColumns().refuses(PartialBinary(0.2)) is None


# -- from end to end ----------------------------------------------------------------------------------------------------------------

ARMS: list[dict[str, Any]] = [
    {}, {"salient": 0.0}, {"salient": 1.0}, {"salient": 0.3, "high_bits": 4, "mask": "flat"}, {"compensate": False},
    {"compensate": False, "metric": "magnitude"}, {"act_order": True, "refits": 2}, {"group": 16, "stats": "lloyd"},
]


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "vit"])
def test_every_arm_on_every_kind_of_model(name: str) -> None:
    model, sample = tiny_models.build(name)
    before = {n: p.clone() for n, p in model.named_parameters()}
    for arm in ARMS if name == "llama" else ARMS[:1]:
        result = dither.quantize(model, PBLLM(**arm), [sample])
        with torch.no_grad():
            out = result.model(**sample)[0]
        assert len(result.report.layers) > 0 and bool(torch.isfinite(out).all())
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_bits_saving_loading_and_repeating(tmp_path: Path) -> None:
    from safetensors import safe_open

    tiny_folder.save(tmp_path / "model")
    recipe = PBLLM(salient=0.05, act_bits=8)
    results = [dither.quantize(tmp_path / "model", recipe, TOKENS, out) for out in (tmp_path / "a", tmp_path / "b", None)]
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()
    held, on_disk = results[2].model, results[0].model
    assert held.state_dict().keys() == on_disk.state_dict().keys()
    assert all(torch.equal(v, on_disk.state_dict()[k]) for k, v in held.state_dict().items())
    held.save_pretrained(tmp_path / "c")
    again, _ = dither.load(tmp_path / "c")
    with torch.no_grad():
        outs = [m(input_ids=TOKENS).logits for m in (held, on_disk, again)]
    assert torch.equal(outs[0], outs[1]) and torch.equal(outs[0], outs[2])
    names = PartialBinary(0.05).layout(32, 32).keys() | PartialBinary(0.05, mask="flat").layout(32, 32).keys()
    stored = 0
    with safe_open(tmp_path / "a/model.safetensors", "pt") as file:
        for name in file.keys():  # noqa: SIM118
            if name.rpartition(".")[2] in names:
                tensor = file.get_tensor(name)
                stored += tensor.numel() * tensor.element_size()
    weights = sum(row.shape[0] * row.shape[1] for row in results[0].report.layers)
    assert results[0].bits_per_weight == pytest.approx(8 * stored / weights)
    with pytest.raises(ExportError, match="no grid"):
        dither.export(tmp_path / "a", tmp_path / "exported")


def test_a_damaged_record_is_told(tmp_path: Path) -> None:
    tiny_folder.save(tmp_path / "model")
    dither.quantize(tmp_path / "model", PBLLM(group=16), TOKENS, tmp_path / "out")
    path = tmp_path / "out/config.json"
    path.write_text(path.read_text().replace('"group": 16', '"group": 7'))
    with pytest.raises(CheckpointError, match="group: 7 does not divide"):
        dither.load(tmp_path / "out")


def test_a_stopped_run_goes_on(tmp_path: Path) -> None:
    tiny_folder.save(tmp_path / "model")
    recipe = PBLLM(salient=0.1, refits=1)
    whole = dither.quantize(tmp_path / "model", recipe, TOKENS, tmp_path / "whole")

    def stop(event: Any) -> None:
        if event.done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        dither.quantize(tmp_path / "model", recipe, TOKENS, tmp_path / "stopped", progress=stop)
    resumed = dither.quantize(tmp_path / "model", recipe, TOKENS, tmp_path / "stopped")
    assert resumed.report.resumed_blocks == 1 and resumed.bits_per_weight == whole.bits_per_weight
    assert (tmp_path / "stopped/model.safetensors").read_bytes() == (tmp_path / "whole/model.safetensors").read_bytes()


def test_overrides_and_refusals() -> None:
    model, _ = tiny_models.build("llama")
    result = dither.quantize(model, PBLLM(overrides={"*.down_proj": PartialBinary(0.5)}), TOKENS)
    shares = {row.name.rpartition(".")[2]: row.scheme for row in result.report.layers}
    assert shares["down_proj"] == "binary + 50 % int8" and shares["up_proj"] == "binary + 10 % int8"
    with pytest.raises(UsageError, match="cannot hold"):
        PBLLM(overrides={"*.down_proj": Int(8) @ channel()}).recipe()
    with pytest.raises(UsageError, match="grids of numbers"):
        build("gptq", {"weights": {"kind": "partial-binary", "salient": 0.1}})


def test_layers_without_data_say_so() -> None:
    model, sample = tiny_models.build("mixtral")
    report = dither.quantize(model, PBLLM(), [sample]).report
    fallen = [row.fallback for row in report.layers if row.fallback]
    assert fallen and all("by magnitude" in text and "calibration tokens" in text for text in fallen)


def test_names_options_and_files(tmp_path: Path) -> None:
    expected = PBLLM(salient=0.2, metric="magnitude", compensate=False).recipe()
    options = {"salient": 0.2, "metric": "magnitude", "compensate": False}
    assert build("pb-llm", options).recipe() == expected
    (tmp_path / "r.yaml").write_text("method: pb-llm\nsalient: 0.2\nmetric: magnitude\ncompensate: false\n")
    assert read(tmp_path / "r.yaml").recipe() == expected
    assert not expected.needs_data and PBLLM(compensate=False).recipe().needs_data
    for options, text in (
        ({"salient": 2}, "salient must be within"),
        ({"metric": "size"}, "metric must be one of"),
        ({"bits": 4}, "has no such knob"),
        ({"saliant": 0.1}, "did you mean 'salient'"),
    ):
        with pytest.raises(UsageError, match=text):
            build("pb-llm", options)
    with pytest.raises(ValueError, match=r"^bits: pb-llm has no such knob"):
        PBLLM(bits=4).recipe()


def test_the_command_line_knows_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from dither.cli.main import main

    tiny_folder.save(tmp_path / "model")
    (tmp_path / "text.txt").write_text(tiny_folder.text())
    command = ["quantize", str(tmp_path / "model"), "--method", "pb-llm", "--set", "salient=0.2", "--calibration", str(tmp_path / "text.txt")]
    with pytest.raises(SystemExit) as end:
        main([*command, "--samples", "4", "--length", "32", "-o", str(tmp_path / "out"), "--json"])
    assert end.value.code == 0 and '"method": "pb-llm"' in capsys.readouterr().out.replace('":"', '": "')
    model, _ = dither.load(tmp_path / "out")
    schemes = {str(m.scheme) for m in model.modules() if isinstance(m, QuantLinear)}
    assert schemes == {"binary + 20 % int8"}
    assert isinstance(model, nn.Module)
