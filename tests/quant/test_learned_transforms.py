"""Learned rotations and scalings (OSTQuant): the student is the folded model, gradients are what they should be, runs repeat and resume."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import dither
import tiny_models
from dither.formats import Float, Int, Scheme, channel, group, token
from dither.graph import fold_norms
from dither.graph.exact import Exact, relative_difference
from dither.quant import losses
from dither.quant.inputs import round_rows
from dither.quant.recipes import VPTQ, OSTQuant
from dither.quant.straight import clip_ratios, straight_rows, straight_weight
from dither.quant.transforms import learn
from dither.quant.transforms.learn import LearnTransforms
from dither.quant.transforms.rebuild import Student
from dither.quant.transforms.rotate import Plan, Turnings
from rewriting import TOKENS, output, random_turnings, view_of

QUICK: dict[str, Any] = {"steps": 4, "k_top": 50}


def values_of(turnings: Any) -> dict[str, Tensor]:
    return (
        {f"stream:{i}": r for i, r in enumerate(turnings.streams)}
        | {f"heads:{k}": r for k, r in turnings.heads.items()}
        | {f"scale:{k}": s for k, s in turnings.scales.items()}
        | {f"keys:{k}": s for k, s in turnings.keys.items()}
    )


def student_of(view: Any, plan: Plan, *, inputs: Scheme | None = None, recompute: bool = False) -> Student:
    model = copy.deepcopy(view.model)
    for stream in plan.whole.residuals:
        fold_norms(model, stream)
    return Student(model, plan, lambda name: inputs, None, recompute=recompute)


@pytest.mark.parametrize("name", ["llama-tied", "qwen2", "gpt2", "phi3", "mixtral", "vit"])
def test_the_student_is_the_folded_model(name: str) -> None:
    """With nothing rounded it returns what the float model does, and its rebuilt weights are those that folding gives."""
    view = view_of(name)
    plan = Plan.of(view, online=True, head_groups=True)
    turnings = random_turnings(plan)
    truth = output(view)[0]
    student = student_of(view, plan)
    with Exact(), torch.no_grad():
        values = values_of(turnings)
        assert relative_difference([student(view.batches[0], values)], [truth]) < 1e-9
        assert relative_difference([student.teacher(view.batches[0])], [truth]) < 1e-9
        built = {n: student._built(n, values) for n in student.steps}
    plan.fold(view, turnings)
    for parameter, value in built.items():
        place = parameter
        for layer in view.turns:
            place = place.replace(f"{layer}.", f"{layer}.layer.")
        torch.testing.assert_close(value, view.model.get_parameter(place), rtol=1e-10, atol=1e-10)
    assert len(built) > 10


def test_nothing_rounded_leaves_nothing_to_learn() -> None:
    """The float function does not depend on R and S: gradients vanish along the manifold."""
    view = view_of("llama-tied")
    plan = Plan.of(view, online=True, head_groups=True)
    values = {k: v.clone().requires_grad_() for k, v in values_of(random_turnings(plan)).items()}
    with Exact():
        out = student_of(view, plan)(view.batches[0], values)
        (out * torch.sin(torch.arange(out.numel(), dtype=out.dtype)).view(out.shape)).sum().backward()  # type: ignore[no-untyped-call]
    for key, x in values.items():
        gradient = x.grad
        assert gradient is not None and float(gradient.abs().max()) > 0, key
        x = x.detach()
        along = gradient - x @ gradient.mT @ x if x.dim() > 1 else gradient * x
        assert float(along.abs().max()) < 1e-8 * max(1.0, float(gradient.abs().max())), key


def test_recomputation_changes_no_gradient() -> None:
    view = view_of("llama", dtype=torch.float32)
    plan = Plan.of(view, online=True, head_groups=True)
    found = []
    for recompute in (False, True):
        student = student_of(view, plan, inputs=Int(4) @ token(), recompute=recompute)
        values = {k: v.float().requires_grad_() for k, v in values_of(random_turnings(plan)).items()}
        student(view.batches[0], values).square().sum().backward()  # type: ignore[no-untyped-call]
        found.append({k: v.grad for k, v in values.items()})
    assert all(torch.equal(found[0][k], found[1][k]) for k in found[0])  # type: ignore[arg-type]


# -- rounding straight through -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", [Int(4) @ token(), Int(3) @ group(5), Int(4, sym=True) @ token(), Float(2, 1) @ group(4)], ids=str)
def test_straight_rows_round_as_run_time_does(scheme: Scheme) -> None:
    x = torch.randn(3, 7, 12, generator=torch.Generator().manual_seed(0)).requires_grad_()
    torch.testing.assert_close(straight_rows(x, scheme), round_rows(x.detach(), scheme), rtol=1e-6, atol=1e-7)
    assert straight_rows(torch.zeros(2, 12), scheme).abs().max() == 0


def test_gradients_pass_through_the_ends_of_the_range() -> None:
    """d x_hat = dx + (x_hat - x) d(max - min) / (max - min), by hand."""
    x = torch.randn(6, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    g = torch.randn(6, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    y = straight_rows(x, Int(4, scale="float32") @ token())
    y.backward(g)
    expected = g.clone()
    for row in range(6):
        lo, hi = int(x[row].argmin()), int(x[row].argmax())
        share = float((g[row] * (y - x).detach()[row]).sum()) / float(x[row, hi] - x[row, lo])
        expected[row, hi] += share
        expected[row, lo] -= share
    torch.testing.assert_close(x.grad, expected, rtol=1e-5, atol=1e-6)


def test_clipped_weights_follow_the_range() -> None:
    w = torch.tensor([[0.1, -0.2, 0.3, 4.0], [0.4, 0.2, -0.1, 0.3]]).requires_grad_()
    scheme = Int(3, sym=True) @ channel()
    ratios = torch.tensor([[0.5], [1.0]])
    y = straight_weight(w, scheme, ratios)
    peak = ratios * torch.tensor([[4.0], [0.4]])
    torch.testing.assert_close(y.detach(), scheme.quantize(w.detach(), scheme.format.params(-peak, peak)))
    y[0, 3].backward()
    torch.testing.assert_close(w.grad, torch.tensor([[0.0, 0, 0, 0.5], [0, 0, 0, 0]]), rtol=1e-3, atol=1e-4)  # 0.5 max|w|


def test_clip_ratios_lower_the_error() -> None:
    w = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))
    w[:, 3] *= 6
    scheme = Int(3, sym=True) @ channel()
    ratios = clip_ratios(w, scheme)
    before, after = ((straight_weight(w, scheme, r) - w).square().sum(1) for r in (torch.ones(16, 1), ratios))
    assert float(ratios.min()) < 1 and bool((after <= before * (1 + 1e-6)).all()) and float(after.sum()) < 0.9 * float(before.sum())


# -- learning --------------------------------------------------------------------------------------------------------------


def data_view(name: str = "llama-tied", method: Any = None, dtype: torch.dtype = torch.float64) -> Any:
    view = view_of(name, method or OSTQuant(kv_bits=None, **QUICK), dtype)
    view.batches = [{"input_ids": part} for part in TOKENS.split(4)]
    return view


@pytest.mark.parametrize("name", ["llama-tied", "qwen2", "gpt2"])
def test_learned_transforms_keep_the_float_function(name: str) -> None:
    view = data_view(name)
    before = output(view)
    LearnTransforms(**QUICK).apply(view)
    assert relative_difference(output(view), before) < 1e-9
    finding = view.findings[0]
    assert finding["orthogonality"] < 1e-10 and len(finding["loss"]) == 4
    assert finding["scale_min"] < 1 < finding["scale_max"]


def test_keys_are_scaled_where_they_are_cached_in_few_bits() -> None:
    for bits in (4, None):
        view = data_view(method=OSTQuant(kv_bits=bits, **QUICK))
        before = output(view)
        part = LearnTransforms(**QUICK)
        plan = Plan.of(view, online=True, head_groups=True)
        found = learn._Work(part, view, plan).learn()
        keys = {k: v for k, v in found.items() if k.startswith("keys:")}
        assert len(keys) == (2 if bits else 0)  # a block each
        assert all(v.shape == (8,) and 0 < float((v - 1).abs().max()) < 1 for v in keys.values())  # 2 heads of 4 rotary pairs
        turnings = ({k.partition(":")[2]: v for k, v in found.items() if k.startswith(kind)} for kind in ("heads:", "scale:", "keys:"))
        view.recipe = dataclasses.replace(view.recipe, kv=None)  # folded weights alone
        plan.fold(view, Turnings([found["stream:0"]], *turnings))
        assert relative_difference(output(view), before) < 1e-9


def test_learning_lowers_the_loss() -> None:
    view = data_view(dtype=torch.float32)
    part = LearnTransforms(steps=40, batch=8, k_top=96)
    work = learn._Work(part, view, Plan.of(view, online=True, head_groups=True))
    with torch.no_grad():
        found = [float(x) for x in work.learn()["losses"]]
    assert sum(found[-5:]) < 0.95 * sum(found[:5])


@pytest.mark.parametrize(
    "knobs", [{"loss": "cross_entropy"}, {"learn": ("R_res",)}, {"learn": ("S",)}, {"init": "hadamard"}, {"optimizer": "cayley_sgd"}]
)
def test_each_knob_changes_what_is_learned(knobs: dict[str, Any]) -> None:
    found = []
    for extra in ({}, knobs):
        view = data_view(dtype=torch.float32)
        found.append(learn._Work(LearnTransforms(**QUICK, **extra), view, Plan.of(view, online=True, head_groups=True)).learn())
    assert not torch.equal(found[0]["stream:0"], found[1]["stream:0"])
    if "learn" in knobs:
        start = learn._Work(LearnTransforms(**QUICK), view, Plan.of(view, online=True, head_groups=True)).values()
        for key, value in found[1].items():
            if key in start:
                fixed = {"stream": "R_res", "heads": "R_ov", "scale": "S"}[key.partition(":")[0]] not in knobs["learn"]
                assert torch.allclose(value, start[key], atol=1e-12) == fixed, key


def test_weights_are_rounded_where_nothing_else_is() -> None:
    view = data_view(method=OSTQuant(act_bits=None, kv_bits=None, bits=3), dtype=torch.float32)
    found = learn._Work(LearnTransforms(**QUICK), view, Plan.of(view, online=True, head_groups=True)).learn()
    assert float(found["losses"].abs().min()) > 0 and not torch.allclose(found["stream:0"].abs(), torch.full((32, 32), 32**-0.5).double())
    with pytest.raises(dither.errors.UsageError, match="nothing is rounded"):
        view = data_view(method=VPTQ(bits=2), dtype=torch.float32)
        learn._Work(LearnTransforms(**QUICK), view, Plan.of(view, online=True, head_groups=True))


def test_too_many_logits_are_refused() -> None:
    model, _ = tiny_models.build("llama")
    with pytest.raises(ValueError, match="k_top: must be at most 96"):
        dither.quantize(model, OSTQuant(steps=1), TOKENS)


def test_a_loss_that_is_not_finite_stops_learning(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def breaks(student: Tensor, teacher: Tensor, k: int) -> Tensor:
        calls.append(1)
        return losses.kl_top(student, teacher, k) * (float("nan") if len(calls) > 2 else 1)

    monkeypatch.setattr(learn, "kl_top", breaks)
    view = data_view(dtype=torch.float32)
    before = output_float(view)
    LearnTransforms(**QUICK).apply(view)
    assert len(view.findings[0]["loss"]) == 2 and "step 2 was not finite" in view.notes[0]
    assert relative_difference([output_float(view)], [before]) < 1e-3


def output_float(view: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = view.model(**view.batches[0]).logits
    return found


def digests(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir()) if p.is_file()}


def test_runs_repeat_and_resume_to_the_same_bytes(tmp_path: Path) -> None:
    model, _ = tiny_models.build("llama-tied")
    recipe = OSTQuant(**QUICK)
    for name in ("one", "two"):
        dither.quantize(model, recipe, TOKENS, tmp_path / name)
    assert digests(tmp_path / "one") == digests(tmp_path / "two")

    class Stopped(Exception):
        pass

    def stop(event: Any) -> None:
        if event.blocks and event.done == 1:
            raise Stopped

    with pytest.raises(Stopped):
        dither.quantize(model, recipe, TOKENS, tmp_path / "three", progress=stop)
    said: list[str] = []
    report = dither.quantize(model, recipe, TOKENS, tmp_path / "three", progress=lambda e: said.append(e.what)).report
    assert report.resumed_blocks == 1 and not any("step" in what for what in said), "it learned again"
    assert digests(tmp_path / "three") == digests(tmp_path / "one")


def test_another_seed_learns_something_else() -> None:
    model, _ = tiny_models.build("llama-tied")
    a, b = (dither.quantize(model, OSTQuant(**QUICK), TOKENS, seed=s).report.sites[0]["loss"] for s in (0, 1))
    assert a != b
