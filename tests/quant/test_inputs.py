"""Few-bit inputs: the numbers against their definitions; and through a whole run: stored, counted, loaded, resumed, cast."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForImageClassification

import dither
import tiny_models
from dither.errors import CheckpointError, UsageError
from dither.formats import Blocks, Float, Int, Params, Scheme, group, tensor, token
from dither.quant.grids import MinMax
from dither.quant.inputs import InputQuant, InputRounding, round_rows
from dither.quant.linear import QuantLinear
from dither.quant.parts import Rounded
from dither.quant.recipe import Recipe
from dither.quant.rounding.nearest import Nearest, nearest
from dither.quant.statistics import Statistics

COLUMNS = Blocks("tile", -1, 1)
WEIGHTS = Int(4) @ group(16)


def dynamic(scheme: Scheme) -> Scheme:
    return replace(scheme, dynamic=True)


def rows(count: int = 40, width: int = 24, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(count, width, generator=generator) * torch.rand(count, 1, generator=generator).exp()).to(dtype)


# -- the numbers ------------------------------------------------------------------------------------------------------


def half_scale(s: Tensor) -> Tensor:
    return s.to(torch.float16).double()


def asymmetric(x: Tensor, bits: int) -> Tensor:
    """Of rows ``[..., n]``, float64."""
    n = 2**bits - 1
    lo, hi = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
    s = half_scale((hi - lo) / n)
    z = (-lo / s).round()
    return s * (((x / s).round() + z).clamp(0, n) - z)


def symmetric(x: Tensor, bits: int) -> Tensor:
    largest = 2 ** (bits - 1) - 1
    s = half_scale(x.abs().amax(-1, keepdim=True) / largest)
    return s * (x / s).round().clamp(-largest, largest)


def floats(x: Tensor, values: Tensor) -> Tensor:
    """The nearest of ``values`` (rising, not negative), scaled by the row's largest."""
    s = half_scale(x.abs().amax(-1, keepdim=True) / values[-1])
    far = (x.abs() / s)[..., None].sub(values).abs()
    first = far.argmin(-1, keepdim=True)
    second = (first + 1).clamp(max=len(values) - 1)
    tie = far.gather(-1, first) == far.gather(-1, second)  # half goes to the even code
    return s * values[torch.where(tie & (first % 2 == 1), second, first)[..., 0]] * x.sign()


E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)
E4M3 = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).double()

BY_ROW: list[tuple[Scheme, Any]] = [
    (Int(8) @ token(), lambda x: asymmetric(x, 8)),
    (Int(4) @ token(), lambda x: asymmetric(x, 4)),
    (Int(4) @ group(8), lambda x: asymmetric(x.view(len(x), -1, 8), 4).view_as(x)),
    (Int(3, sym=True) @ token(), lambda x: symmetric(x, 3)),
    (Int(8, sym=True) @ group(12), lambda x: symmetric(x.view(len(x), -1, 12), 8).view_as(x)),
    (Float(2, 1) @ token(), lambda x: floats(x, E2M1)),
    (Float(4, 3) @ token(), lambda x: floats(x, E4M3)),
    (Float(2, 1) @ group(8), lambda x: floats(x.view(len(x), -1, 8), E2M1).view_as(x)),
]


@pytest.mark.parametrize(("scheme", "definition"), BY_ROW, ids=lambda x: str(x) if isinstance(x, Scheme) else "")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_dynamic_rows_are_what_the_definition_says(scheme: Scheme, definition: Any, dtype: torch.dtype) -> None:
    x = rows(dtype=dtype)
    got, want = round_rows(x, dynamic(scheme)), definition(x.double())
    assert got.dtype == dtype
    near = {torch.float32: 2e-6, torch.bfloat16: 2.0**-8, torch.float64: 1e-12}[dtype]  # the type's own rounding; no code moved
    assert bool(((got.double() - want).abs() <= near * x.double().abs().amax(1, keepdim=True)).all())
    assert torch.equal(got[5:6], round_rows(x[5:6], dynamic(scheme)))  # a row does not depend on the others
    assert torch.equal(round_rows(x.view(4, 10, -1), dynamic(scheme)).view_as(x), got)
    assert round_rows(x[:0], dynamic(scheme)).shape == (0, 24)


@pytest.mark.parametrize("scheme", [s for s, _ in BY_ROW] + [Int(4) @ group(9), Float(2, 1, scale="e8m0") @ group(16)], ids=str)
def test_the_short_way_is_the_long_way(scheme: Scheme) -> None:
    """Kernel or fewer calls: the bits are those of fit, encode, decode. Groups that do not divide the row too."""
    x = rows()
    params = scheme.fit(x)
    assert torch.equal(round_rows(x, dynamic(scheme)), scheme.decode(scheme.encode(x, params), params))


@pytest.mark.parametrize("width", [48, 40], ids=["full", "ragged"])
def test_nvfp4_has_a_tensor_scale_for_each_row(width: int) -> None:
    scheme = dynamic(dither.formats.NVFP4)
    x = rows(width=width)
    x[3] *= 1e4
    together = round_rows(x, scheme)
    for i in range(len(x)):
        alone = x[i : i + 1]
        assert torch.equal(round_rows(alone, scheme)[0], together[i])
        assert torch.allclose(scheme.quantize(alone)[0], together[i], rtol=1e-5)  # the tensor of one row
    assert torch.equal(round_rows(torch.zeros(2, 32), scheme), torch.zeros(2, 32))


def test_static_grids_clip_what_lies_beyond() -> None:
    x = torch.tensor([[-10.0, -0.4, 0.6, 5.0], [0.0, 1.5, 2.5, 100.0]])
    one = {"scale": torch.full((1, 1), 1.0), "zero_point": torch.full((1, 1), 3.0)}
    assert torch.equal(round_rows(x, Int(3) @ tensor(), one), torch.tensor([[-3.0, 0, 1, 4], [0, 2, 2, 4]]))
    each = {"scale": torch.tensor([[1.0, 0.5, 0.25, 10.0]]), "zero_point": torch.tensor([[0.0, 4, 7, 0]])}
    want = torch.tensor([[0.0, -0.5, 0, 0], [0, 1.5, 0, 70]])
    assert torch.equal(round_rows(x, Int(3) @ COLUMNS, each), want)
    assert torch.equal(round_rows(x[:1], Int(3) @ COLUMNS, each), want[:1])
    fp = {"scale": torch.full((1, 1), 2.0)}
    assert torch.equal(round_rows(x, Float(2, 1) @ tensor(), fp), torch.tensor([[-8.0, 0, 1, 4], [0, 2, 2, 12]]))  # 2.5 / 2 is a tie


def test_a_shift_is_exact_and_moves_small_channels_into_the_grid() -> None:
    x, shift = rows(), torch.arange(24).sub(8).to(torch.int8)
    scheme = dynamic(Float(2, 3) @ token())
    lifted = x * torch.exp2(shift.float())
    assert torch.equal(round_rows(x, scheme, shift=shift), round_rows(lifted, scheme) * torch.exp2(-shift.float()))
    same = torch.full((24,), 3, dtype=torch.int8)  # one power of two for all: only the scale moves
    assert torch.equal(round_rows(x, scheme, shift=same), round_rows(x, scheme))
    small = x.clone()
    small[:, ::2] *= 2.0**-10
    lift = torch.zeros(24, dtype=torch.int8)
    lift[::2] = 10
    error = (round_rows(small, scheme, shift=lift) - small)[:, ::2].norm() / small[:, ::2].norm()
    assert error < 0.1 < (round_rows(small, scheme) - small)[:, ::2].norm() / small[:, ::2].norm()


@pytest.mark.parametrize("scheme", [Int(8) @ token(), Int(4, sym=True) @ token(), Float(4, 3) @ group(8)], ids=str)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_is_said_to_be_an_input(scheme: Scheme, bad: float) -> None:
    x = rows()
    x[2, 3] = bad
    with pytest.raises(ValueError, match="inputs"):
        round_rows(x, dynamic(scheme))


# -- a whole run ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fixed(Nearest):
    """Nearest, with inputs as ``kind`` says, fitted on nothing: their values only have to survive."""

    kind: str = "tensor"
    floats: bool = False

    def round(self, weight: Tensor, scheme: Scheme, params: Params, statistics: Statistics | None) -> Rounded:
        return Rounded(nearest(weight, scheme, params), inputs=self.inputs(weight.shape[1]))

    def inputs(self, width: int) -> InputQuant:
        blocks = {"tensor": tensor(), "columns": COLUMNS, "shift": token()}[self.kind]
        form = Float(2, 3) if self.floats else Int(6)
        shift = torch.arange(width).remainder(3).to(torch.int8) if self.kind == "shift" else None
        if self.kind == "shift":
            return InputQuant(dynamic(form @ blocks), None, shift)
        size = blocks.grid_shape(1, width)
        params = {"scale": torch.linspace(0.0123456, 0.1234567, size[1]).view(size)}  # no bfloat16 number
        if not self.floats:
            params["zero_point"] = torch.full(size, 31.0)
        return InputQuant(form @ blocks, params)


RECIPES = {
    "token": Recipe((), WEIGHTS, inputs=dynamic(Int(8) @ token())),
    "group": Recipe((), WEIGHTS, inputs=dynamic(Int(4, sym=True) @ group(16))),
    "fp8": Recipe((), Float(4, 3) @ group(16), inputs=dynamic(Float(4, 3) @ token())),
    "nvfp4": Recipe((), dither.formats.NVFP4, inputs=dynamic(dither.formats.NVFP4)),
    "static": Recipe((MinMax(), Fixed()), WEIGHTS),
    "static-float": Recipe((MinMax(), Fixed(floats=True)), WEIGHTS),
    "columns": Recipe((MinMax(), Fixed("columns")), WEIGHTS),
    "shift": Recipe((MinMax(), Fixed("shift", floats=True)), WEIGHTS),
}
SAMPLES = {name: tiny_models.build(name)[1] for name in ("llama", "gpt2", "vit", "mixtral")}


@torch.no_grad()
def output(model: nn.Module, name: str, dtype: torch.dtype = torch.float32) -> Tensor:
    sample = {k: v.to(dtype) if v.is_floating_point() else v for k, v in SAMPLES[name].items()}
    found: Tensor = model(**sample).logits
    return found


def of_disk(folder: Path, name: str, dtype: torch.dtype) -> nn.Module:
    auto = AutoModelForImageClassification if name == "vit" else AutoModelForCausalLM
    model, info = auto.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return model.eval()  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("name", "kind"), [("llama", kind) for kind in RECIPES] + [(n, kind) for n in ("gpt2", "vit", "mixtral") for kind in ("token", "columns")]
)
def test_from_disk_as_in_memory(name: str, kind: str, tmp_path: Path) -> None:
    recipe = RECIPES[kind]
    for dtype in (torch.float32, torch.bfloat16):
        source, out = tmp_path / f"model-{dtype}", tmp_path / f"few-{dtype}"
        tiny_models.build(name)[0].to(dtype).save_pretrained(source)
        report = dither.quantize(source, recipe, out=out).report
        original, loaded = of_disk(source, name, dtype), of_disk(out, name, dtype)
        memory = dither.quantize(original, recipe).model
        assert torch.equal(output(loaded, name, dtype), output(memory, name, dtype))
        assert not torch.equal(output(loaded, name, dtype), output(original, name, dtype))
        held = {n: m for n, m in loaded.named_modules() if isinstance(m, InputRounding)}
        assert held and len(held) == sum(row.inputs is not None for row in report.layers)
        for key, module in held.items():  # not one bit is lost to the type of the model
            twin = memory.get_submodule(key)
            for n, buffer in module.named_buffers():
                assert buffer.dtype in (torch.float32, torch.int8) and torch.equal(buffer, twin.get_buffer(n))
    floats = [row.name for row in report.layers if row.inputs is None]
    assert all("experts" in n for n in floats) if name == "mixtral" else all("conv" in n or "patch" in n for n in floats)
    assert all(any(n in note for note in report.notes) for n in floats)


@pytest.mark.parametrize("recipe", [RECIPES[kind] for kind in ("token", "columns", "shift")], ids=["token", "columns", "shift"])
def test_every_bit_is_counted_and_a_stopped_run_gives_the_same_bytes(recipe: Recipe, tmp_path: Path) -> None:
    model, _ = tiny_models.build("llama")
    model.save_pretrained(tmp_path / "model")
    whole = dither.quantize(tmp_path / "model", recipe, out=tmp_path / "whole")
    with safe_open(tmp_path / "whole" / "model.safetensors", "pt") as file:  # type: ignore[no-untyped-call]
        sizes = {key: file.get_tensor(key).nbytes for key in file.keys()}  # noqa: SIM118
    few = [key for key in sizes if ".layers." in key and "norm" not in key]
    weights = sum(p.numel() for n, p in model.named_parameters() if ".layers." in n and "norm" not in n)
    assert whole.report.bits_per_weight == pytest.approx(8 * sum(sizes[key] for key in few) / weights)

    class Stopped(Exception):
        pass

    def stop(event: Any) -> None:
        if event.done == 1:
            raise Stopped

    with pytest.raises(Stopped):
        dither.quantize(tmp_path / "model", recipe, out=tmp_path / "resumed", progress=stop)
    resumed = dither.quantize(tmp_path / "model", recipe, out=tmp_path / "resumed")
    assert resumed.report.resumed_blocks == 1
    for file_name in ("model.safetensors", "config.json", "dither.json"):
        assert (tmp_path / "whole" / file_name).read_bytes() == (tmp_path / "resumed" / file_name).read_bytes()


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_casts_and_copies_keep_what_is_stored(recipe: Recipe) -> None:
    model = dither.quantize(tiny_models.build("llama")[0], recipe).model
    before = {n: b.clone() for n, b in model.named_buffers() if ".inputs." in n}
    half, cast = nn.Module.half, nn.Module.bfloat16  # transformers' own refuse quantized models
    twin = cast(half(copy.deepcopy(model)))
    after = {n: b for n, b in twin.named_buffers() if ".inputs." in n}
    assert before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in before)
    assert output(twin, "llama", torch.bfloat16).dtype == torch.bfloat16


def test_the_layer_multiplies_the_rounded_input() -> None:
    weight, x = rows(20, 24, seed=2), rows(7)
    quant = InputQuant(dynamic(Int(4) @ token()))
    packed = nearest(weight, Int(4) @ group(8))
    layer = QuantLinear(packed.scheme, 24, 20, None, packed.tensors(), inputs=quant.module())
    want = asymmetric(x.double(), 4) @ packed.dequantize().double().T
    assert torch.allclose(layer(x).double(), want, rtol=0, atol=1e-5 * float(want.abs().max()))
    assert "int4 asymmetric token dynamic, dynamic" in repr(layer)


def test_records_that_make_no_sense_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="must be dynamic"):
        Recipe((), WEIGHTS, inputs=Int(8) @ token())
    record = Fixed().inputs(24).to_json()
    with pytest.raises(ValueError, match="parameters"):
        InputRounding.from_json({**record, "params": {"forward": [1, 1]}})
    module = Fixed().inputs(24).module()
    module.scale.fill_(torch.nan)
    with pytest.raises(CheckpointError, match="scale"):
        module.check()
