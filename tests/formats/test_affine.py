"""Int against the affine maths of others, bit for bit: the observers and operators of torch.ao, and the formulas in numpy.

torch.ao multiplies by the reciprocal of the scale where dither divides by the scale (as GPTQ and AWQ do); the two are the same number only
for powers of two, so that is where codes are compared with torch.ao's. On any scale they are compared with a division in numpy.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.ao.quantization import PerChannelMinMaxObserver
from torch.ao.quantization.fx import _decomposed  # noqa: F401  # registers the operators

from dither.formats import Int, channel, group

OPERATORS = torch.ops.quantized_decomposed
# the codes of each convention, as torch.ao counts them
RANGES: dict[Any, Any] = {
    False: lambda bits: (0, 2**bits - 1),
    "restricted": lambda bits: (1 - 2 ** (bits - 1), 2 ** (bits - 1) - 1),
    "full": lambda bits: (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1),
}
CASES = [(bits, sym) for bits in (2, 3, 4, 8) for sym in RANGES]


def weights(rows: int = 64, columns: int = 48) -> Tensor:
    """Rows of many sizes; some have one sign only."""
    draw = torch.Generator().manual_seed(0)
    w = torch.randn(rows, columns, generator=draw) * torch.logspace(-3, 3, rows)[:, None]
    w[::7] = w[::7].abs()
    w[3::7] = -w[3::7].abs()
    return w


@pytest.mark.parametrize(("bits", "sym"), CASES)
def test_parameters_are_those_of_torch_ao(bits: int, sym: Any) -> None:
    low, high = RANGES[sym](bits)
    observer = PerChannelMinMaxObserver(
        dtype=torch.qint8 if sym else torch.quint8,
        qscheme=torch.per_channel_symmetric if sym else torch.per_channel_affine,
        quant_min=low,
        quant_max=high,
        eps=2**-126,
    )
    observer(weights())
    scale, zero = observer.calculate_qparams()
    params = (Int(bits, sym=sym, scale="float32") @ channel()).fit(weights())
    assert torch.equal(params["scale"][:, 0], scale)
    if not sym:
        assert torch.equal(params["zero_point"][:, 0], zero.float())


def on_powers_of_two(bits: int, sym: Any) -> tuple[Int, Tensor, Tensor, Tensor]:
    """A format, values (random ones, and all multiples of half a step: every second of them a tie), scales and zero points."""
    draw = torch.Generator().manual_seed(bits)
    scale = 2.0 ** torch.arange(-8, 8)
    low, high = RANGES[sym](bits)
    zero = torch.zeros(16) if sym else torch.randint(low, high + 1, (16,), generator=draw).float()
    halves = torch.arange(-2 * 2**bits, 2 * 2**bits + 1) / 2
    x = torch.cat([torch.randn(16, 200, generator=draw) * 2**bits / 2, halves.expand(16, -1)], 1) * scale[:, None]
    return Int(bits, sym=sym, scale="float32"), x, scale, zero


@pytest.mark.parametrize(("bits", "sym"), CASES)
def test_codes_and_values_are_those_of_torch_ao(bits: int, sym: Any) -> None:
    fmt, x, scale, zero = on_powers_of_two(bits, sym)
    low, high = RANGES[sym](bits)
    kind = torch.int8 if sym else torch.uint8
    whole = zero.long()
    codes = OPERATORS.quantize_per_channel(x, scale, whole, 0, low, high, kind)
    values = OPERATORS.dequantize_per_channel(codes, scale, whole, 0, low, high, kind)
    params = {"scale": scale} | ({} if sym else {"zero_point": zero})
    shift = 2 ** (bits - 1) if sym else 0  # stored codes are unsigned
    assert torch.equal(fmt.encode(x, params).long() - shift, codes.long())
    assert torch.equal(fmt.decode(fmt.encode(x, params), params), values)
    assert torch.equal(fmt.quantize(x, params), values)


def test_groups_are_those_of_torch_ao() -> None:
    draw = torch.Generator().manual_seed(0)
    scale = 2.0 ** torch.randint(-4, 4, (24, 5), generator=draw)
    zero = torch.randint(0, 16, (24, 5), generator=draw)
    w = torch.randn(24, 80, generator=draw) * 8
    codes = OPERATORS.quantize_per_channel_group(w, scale, zero, 0, 15, torch.uint8, 16)
    params = {"scale": scale, "zero_point": zero.float()}
    assert torch.equal((Int(4, scale="float32") @ group(16)).encode(w, params), codes)


def formulas(w: np.ndarray, bits: int, sym: Any, zero: str) -> tuple[np.ndarray, np.ndarray]:
    """Unsigned codes and values of each row by the textbook, float32 throughout."""
    f, n = np.float32, 2**bits - 1
    low, high, peak = w.min(1, keepdims=True), w.max(1, keepdims=True), np.abs(w).max(1, keepdims=True)
    middle = 2 ** (bits - 1)
    if sym:
        most = np.take_along_axis(w, np.abs(w).argmax(1)[:, None], 1)
        s = {"restricted": peak / f(middle - 1), "full": peak / f(n / 2), "extremum": most / f(-middle)}[sym]
        q = np.clip(np.rint(w / s), (1 if sym == "restricted" else 0) - middle, middle - 1)
        return q + middle, s * q
    if zero == "float":
        s, m = (high - low) / f(n), low.astype(np.float16).astype(f)
        q = np.clip(np.rint((w - m) / s), 0, n)
        return q, s * q + m
    low, high = np.minimum(low, 0), np.maximum(high, 0)
    s = (high - low) / f(n)
    z = np.rint(-low / s)
    q = np.clip(np.rint(w / s) + z, 0, n)
    return q, s * (q - z)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize(
    ("sym", "zero"), [(False, "int"), (False, "float"), ("restricted", "int"), ("full", "int"), ("extremum", "int")]
)
def test_codes_and_values_are_those_of_the_formulas(bits: int, sym: Any, zero: str) -> None:
    w = weights()
    scheme = Int(bits, sym=sym, zero=zero, scale="float32") @ channel()
    params = scheme.fit(w)
    codes, values = formulas(w.numpy(), bits, sym, zero)
    assert np.array_equal(scheme.encode(w, params).numpy(), codes)
    assert np.array_equal(scheme.decode(scheme.encode(w, params), params).numpy(), values)
