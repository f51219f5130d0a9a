"""Products of rounded rows in Triton: int8 and float8 against float64 on what dither's own formats store, on the GPU or in the interpreter."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels.gpu_problems import DEVICE, UNIT

pytest.importorskip("triton")

from dither.formats import Float, Int, QTensor, Scheme, channel, tensor, token
from dither.kernels.gpu.fp8 import float8_matmul
from dither.kernels.gpu.plans import tile_plans
from dither.kernels.gpu.presence import has_float8
from dither.kernels.gpu.reference import float8_matmul_reference, int8_matmul_reference
from dither.kernels.gpu.rounded import round_rows
from dither.kernels.gpu.tuning import Plan
from dither.kernels.gpu.w8a8 import int8_matmul

SHAPES = pytest.mark.parametrize(("rows", "columns", "tokens"), [(65, 256, 3), (7, 130, 1), (70, 301, 33), (1, 3, 2)])
PLANS = pytest.mark.parametrize("plan", [None, Plan("tile", 64, 16, 64, 1), Plan("tile", 64, 32, 64, 3)], ids=["own", "tile", "parts"])
# the interpreter cuts bfloat16 off where devices round
SCALES = pytest.mark.parametrize("scale", ["float32", "float16", *(["bfloat16"] if DEVICE == "cuda" else [])])
needs_float8 = pytest.mark.skipif(not has_float8(torch.device(DEVICE)), reason="this device does not multiply float8")


def problem(scheme: Scheme, rows: int, columns: int, tokens: int) -> tuple[Tensor, QTensor]:
    """x float32, with one row a hundred times the others, and rounded weights."""
    g = torch.Generator().manual_seed(rows)
    weight, x = torch.randn(rows, columns, generator=g), torch.randn(tokens, columns, generator=g)
    x[0] *= 100
    params = scheme.fit(weight)
    return x, QTensor.from_codes(scheme.encode(weight, params), params, scheme)


def true(x: Tensor, scheme: Scheme, weight: QTensor) -> Tensor:
    """The product in float64 of what dither's formats make of x and of the weights."""
    rounded = torch.cat([scheme.decode(scheme.encode(row, p), p) for row in x.split(1) for p in [scheme.fit(row)]])
    return rounded.double() @ weight.dequantize().double().T


def close(found: Tensor, expected: Tensor, unit: float = 2.0**-19) -> None:
    size = expected.pow(2).mean(1, keepdim=True).sqrt()
    assert found.shape == expected.shape
    assert bool(((found.double().cpu() - expected).abs() <= unit * (expected.abs() + size)).all())


@SHAPES
@PLANS
@SCALES
@pytest.mark.parametrize("sym", ["restricted", "full", False])
def test_int8_is_what_the_formats_say(plan: Plan | None, scale: str, sym: str | bool, rows: int, columns: int, tokens: int) -> None:
    x, weight = problem(Int(8, sym=sym) @ channel(), rows, columns, tokens)
    expected = true(x, Int(8, sym="restricted", scale=scale) @ token(), weight)
    held = {k: v.to(DEVICE) for k, v in weight.tensors().items()}
    arguments = (x.to(DEVICE), held["codes"], held["scale"], held.get("zero_point"), scale)
    close(int8_matmul(*arguments, plan), expected)
    close(int8_matmul_reference(*arguments), expected)


@needs_float8
@SHAPES
@PLANS
@SCALES
@pytest.mark.parametrize("by", [channel(), tensor()], ids=["channel", "tensor"])
def test_float8_is_what_the_formats_say(plan: Plan | None, scale: str, by: object, rows: int, columns: int, tokens: int) -> None:
    x, weight = problem(Float(4, 3) @ by, rows, columns, tokens)  # type: ignore[operator]
    expected = true(x, Float(4, 3, scale=scale) @ token(), weight)
    held = {k: v.to(DEVICE) for k, v in weight.tensors().items()}
    # a device sums a block of products with some 14 bits
    close(float8_matmul(x.to(DEVICE), held["codes"], held["scale"], scale, plan), expected, 2.0**-10 if DEVICE == "cuda" else 2.0**-19)
    close(float8_matmul_reference(x.to(DEVICE), held["codes"], held["scale"], scale), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_types_of_x(dtype: torch.dtype) -> None:
    x, weight = problem(Int(8, sym="restricted") @ channel(), 40, 200, 5)
    x[0] /= 100
    x = x.to(dtype)
    expected = true(x.float(), Int(8, sym="restricted", scale="float32") @ token(), weight)
    found = int8_matmul(x.to(DEVICE), *(weight.stored[k].to(DEVICE) for k in ("codes", "scale")), None)
    assert found.dtype == dtype
    close(found, expected, UNIT)


@pytest.mark.parametrize("tokens", [1, 40, 130])
def test_every_plan_that_may_be_taken(tokens: int) -> None:
    x, weight = problem(Int(8) @ channel(), 66, 320, tokens)
    expected = true(x, Int(8, sym="restricted", scale="float32") @ token(), weight)
    held = {k: v.to(DEVICE) for k, v in weight.tensors().items()}
    for plan in tile_plans(tokens, 66, 320, 132, narrow=True):
        close(int8_matmul(x.to(DEVICE), held["codes"], held["scale"], held["zero_point"], "float32", plan), expected)


def test_rows_are_rounded_to_the_bit() -> None:
    g = torch.Generator().manual_seed(1)
    x = torch.randn(6, 5000, generator=g)
    x[2, :200] = torch.arange(200) / 127 - 0.5  # ties
    x[2, 0] = 1.0
    x[3] *= 1e-30
    x[4] = 0
    q, s, total = round_rows(x.to(DEVICE), 127.0, torch.int8, "float32")
    fmt = Int(8, sym="restricted", scale="float32")
    params = fmt.fit(x)
    assert torch.equal(s.cpu(), params["scale"])
    assert torch.equal(q.cpu().int() + 128, fmt.encode(x, params).int())
    assert torch.equal(total.cpu(), q.cpu().int().sum(1, dtype=torch.int32))


@needs_float8
def test_rows_are_rounded_to_float8_to_the_bit() -> None:
    codes = torch.arange(0, 127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()  # 0 .. 448, subnormal ones too
    middle = (codes[1:] + codes[:-1]) / 2  # ties
    near = torch.cat([middle * (1 - 2.0**-20), middle * (1 + 2.0**-20)])
    x = torch.cat([codes, -codes, middle, -middle, near, -near])[None]
    q, s, _ = round_rows(x.to(DEVICE), 448.0, torch.float8_e4m3fn, "float32")
    assert float(s) == 1.0
    assert torch.equal(q.cpu().float(), x.to(torch.float8_e4m3fn).float())


def test_rows_with_nan_or_inf_become_nan() -> None:
    x, weight = problem(Int(8) @ channel(), 20, 300, 4)
    x[1, 299], x[2, 7] = float("nan"), float("-inf")
    held = {k: v.to(DEVICE) for k, v in weight.tensors().items()}
    for function in (int8_matmul, int8_matmul_reference):
        found = function(x.to(DEVICE), held["codes"], held["scale"], held["zero_point"], "float32")
        assert bool(found[1:3].isnan().all()) and bool(found[[0, 3]].isfinite().all())


def test_what_is_refused() -> None:
    x, weight = problem(Int(8, sym="restricted") @ channel(), 4, 64, 2)
    x, codes, scale = x.to(DEVICE), weight.stored["codes"].to(DEVICE), weight.stored["scale"].to(DEVICE)
    for arguments, message in (
        ((x.double(), codes, scale, None), "x: dtype"),
        ((x, codes[:, :60].clone(), scale, None), "packed"),
        ((x, codes, scale[:3].clone(), None), "scale"),
        ((x, codes, scale, codes[0, :3].clone()), "zero"),
        ((x, codes, scale, None, "e8m0"), "input_scale"),
        ((x, codes, scale.to("meta"), None), "one device"),
    ):
        with pytest.raises(ValueError, match=message):
            int8_matmul(*arguments)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="scale"):
        float8_matmul(x, codes, scale[:3].clone())


def test_devices_without_float8_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = problem(Float(4, 3) @ channel(), 4, 64, 2)
    monkeypatch.setattr("dither.kernels.gpu.fp8.has_float8", lambda device: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    with pytest.raises(RuntimeError, match="A100 does not multiply float8"):
        float8_matmul(x.to(DEVICE), weight.stored["codes"].to(DEVICE), weight.stored["scale"].to(DEVICE))
