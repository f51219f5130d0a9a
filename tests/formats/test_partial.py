"""Mixed storage: how many weights are salient, what is stored, what it costs, and what damage is found."""

from __future__ import annotations

from fractions import Fraction
from math import comb, log2
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dither.errors import CheckpointError
from dither.formats import PartialBinary, QTensor, channel, scheme_from_json

SHARES = (0.0, 0.02, 0.1, 0.3, 0.5, 0.9, 0.999, 1.0)


def made(shape: tuple[int, int], scheme: PartialBinary, seed: int = 0) -> tuple[QTensor, Tensor, Tensor]:
    """A matrix in its stored form, its mask, and its values, written out."""
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(*shape, generator=g)
    binary = scheme.choose(w.abs())
    high = scheme.high @ channel()
    params = high.fit(w)
    codes = torch.where(binary, (w > 0).to(torch.uint8), high.encode(w, params))
    groups = shape[1] // scheme.width(shape[1])
    alpha, mu = (torch.randn(shape[0], groups, generator=g).abs().half().float() for _ in range(2))
    index = scheme.column_groups(shape[1])
    levels = torch.where(codes > 0, (mu + alpha)[:, index], (mu - alpha)[:, index])
    values = torch.where(binary, levels, high.decode(codes, params))
    return scheme.pack(binary, codes, alpha, mu, params["scale"], params["zero_point"]), binary, values


@pytest.mark.parametrize("mask", ["flat", "shorter"])
@pytest.mark.parametrize("salient", SHARES)
@pytest.mark.parametrize("shape", [(1, 1), (7, 13), (33, 96), (24, 64)])
def test_stored_and_read_back(shape: tuple[int, int], salient: float, mask: str, tmp_path: Path) -> None:
    for high_bits, group in ((8, None), (3, None), (5, 32 if shape[1] % 32 == 0 else None)):
        scheme = PartialBinary(salient, high_bits, group, mask)
        tensor, binary, values = made(shape, scheme)
        tensor.save(tmp_path / "t.safetensors")
        read = QTensor.load(tmp_path / "t.safetensors")
        assert read.scheme == scheme and read.shape == shape
        assert torch.equal(read.dequantize(), values) and torch.equal(scheme.binary_of(read.stored, shape), binary)
        for dtype in (torch.bfloat16, torch.float16, torch.float64):
            assert torch.equal(read.dequantize(dtype), values.to(dtype))


@pytest.mark.parametrize("group", [None, 32])
@pytest.mark.parametrize("salient", SHARES)
def test_counts_follow_from_the_shape(salient: float, group: int | None) -> None:
    """``|M| = floor(n rho) + 1`` in each column group without ties, none for rho = 0 and all for rho = 1 (which ends past the list in the paper's
    code); with ties the first in order."""
    rows, columns = 40, 96
    scheme = PartialBinary(salient, 8, group)
    n, rho = rows * (group or columns), 1 - Fraction(str(salient))
    want = {0: 0, 1: n}.get(rho, int(n * rho) + 1)  # type: ignore[call-overload]
    values = torch.rand(rows, columns, generator=torch.Generator().manual_seed(0))
    for v in (values, torch.ones(rows, columns), values.round(decimals=1)):
        chosen = scheme.choose(v)
        assert chosen.view(rows, -1, group or columns).sum((0, 2)).tolist() == [want] * (columns // (group or columns))
        for g in range(0, columns, group or columns):
            inside, own = v[:, g : g + (group or columns)].reshape(-1), chosen[:, g : g + (group or columns)].reshape(-1)
            order = inside.argsort(stable=True)
            assert bool(own[order[:want]].all()) and not bool(own[order[want:]].any())


@pytest.mark.parametrize(
    ("share", "rows", "columns", "count"),
    [(0.1, 10, 10, 91), (0.3, 10, 10, 71), (0.9, 1, 10, 2), (0.7, 10, 10, 31), (0.1, 1, 1, 1)],
)
def test_shares_are_read_as_decimals(share: float, rows: int, columns: int, count: int) -> None:
    """1 - 0.9 is 0.09999999999999998 in binary: of ten weights it would lose one."""
    assert PartialBinary(share).binarised(rows, columns) == count


@pytest.mark.parametrize("high_bits", [2, 5, 8])
@pytest.mark.parametrize("salient", [0.02, 0.05, 0.1, 0.3, 0.5])
def test_bits_are_the_formula(salient: float, high_bits: int, tmp_path: Path) -> None:
    """``k B + (n - k) + mask`` bits and (16 + 16) G O + (16 + B + 32) O: the bytes on disk but for the file's header."""
    rows, columns = 64, 512
    for mask, groups in (("flat", 1), ("shorter", 1), ("flat", 8)):
        scheme = PartialBinary(salient, high_bits, None if groups == 1 else columns // groups, mask)
        tensor, binary, _ = made((rows, columns), scheme)
        n, k = rows * columns, int((~binary).sum())
        assert k == scheme.salient_count(rows, columns)
        weights = k * high_bits + n - k + rows * (32 * groups + 16 + high_bits + 32)
        stored = 8 * sum(t.numel() * t.element_size() for key, t in tensor.tensors().items() if key not in ("mask", "places_low", "places_high"))
        assert weights <= stored < weights + 16  # two streams end within a byte
        listed = 8 * sum(tensor.stored[key].numel() for key in ("places_low", "places_high") if key in tensor.stored)
        if mask == "flat" or not listed:
            assert tensor.stored["mask"].numel() * 8 == n
        else:
            assert listed < n and log2(comb(n, k)) <= listed <= log2(comb(n, k)) + 0.6 * k + 16
        assert mask == "flat" or (listed > 0) == (salient <= 0.1)
        tensor.save(tmp_path / "t.safetensors")
        raw = (tmp_path / "t.safetensors").read_bytes()
        assert len(raw) - 8 - int.from_bytes(raw[:8], "little") == tensor.nbytes == tensor.bits * n / 8


def test_what_is_empty_is_not_stored() -> None:
    assert set(PartialBinary(0).layout(8, 64)) == {"signs", "alpha", "mu"}
    assert set(PartialBinary(1).layout(8, 64)) == {"signs", "codes", "scale", "zero_point"}
    assert QTensor.empty(PartialBinary(1), (8, 64)).nbytes == 8 * 64 + 3 * 8  # whole bytes, scale and zero point


def test_rarer_kind_is_listed() -> None:
    few, many = (made((64, 128), PartialBinary(s))[0] for s in (0.03, 0.97))
    assert "places_high" in few.stored and "places_high" in many.stored
    assert abs(few.stored["places_high"].numel() - many.stored["places_high"].numel()) <= 1


def damaged(tensor: QTensor, key: str, value: Tensor) -> None:
    QTensor.from_tensors({**tensor.tensors(), key: value}, tensor.scheme, tensor.shape)


def test_damage_is_told() -> None:
    flat, listed = (made((20, 72), PartialBinary(0.1, mask=m))[0] for m in ("flat", "shorter"))
    bit = flat.stored["mask"].clone()
    bit[3, 2] ^= 16
    with pytest.raises(CheckpointError, match=r"^mask: binarises"):
        damaged(flat, "mask", bit)
    beyond = flat.stored["mask"].clone()
    beyond[3, -1] |= 128
    with pytest.raises(CheckpointError, match=r"^mask: has bits beyond"):
        damaged(flat, "mask", beyond)
    for tensor in (flat, listed):
        moved = tensor.stored["offsets"].to(torch.int64)
        moved[4] += 1
        with pytest.raises(CheckpointError, match=r"^offsets: "):
            damaged(tensor, "offsets", moved.to(torch.uint32))
        with pytest.raises(CheckpointError, match=r"^alpha: "):
            damaged(tensor, "alpha", torch.full_like(tensor.stored["alpha"], torch.nan))
        with pytest.raises(CheckpointError, match=r"^codes: "):
            damaged(tensor, "codes", tensor.stored["codes"][:-1])
    high = listed.stored["places_high"].clone()
    high[0] ^= 255
    with pytest.raises(CheckpointError, match=r"^places_(high|low): |^offsets: |^mask: "):
        damaged(listed, "places_high", high)
    with pytest.raises(CheckpointError, match=r"^places_high: lists 0"):
        damaged(listed, "places_high", torch.zeros_like(high))
    low = torch.randint(0, 256, listed.stored["places_low"].shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with pytest.raises(CheckpointError, match=r"^places_low: |^offsets: "):
        damaged(listed, "places_low", low)
    with pytest.raises(CheckpointError, match=r"^offsets: is missing"):
        QTensor.from_tensors({k: v for k, v in flat.tensors().items() if k != "offsets"}, flat.scheme, flat.shape)


@pytest.mark.parametrize("scheme", [PartialBinary(0.1), PartialBinary(0.25, 4, 64, "flat"), PartialBinary(0), PartialBinary(1)])
def test_json(scheme: PartialBinary) -> None:
    assert scheme_from_json(scheme.to_json()) == scheme
    with pytest.raises(ValueError, match="partial-binary"):
        scheme_from_json({**scheme.to_json(), "more": 1})


def test_wrong_values() -> None:
    cases: list[tuple[str, dict[str, object]]] = [
        ("salient", {"salient": 1.5}),
        ("salient", {"salient": -0.1}),
        ("salient", {"salient": float("nan")}),
        ("salient", {"salient": "much"}),
        ("high_bits", {"high_bits": 1}),
        ("high_bits", {"high_bits": 9}),
        ("group", {"group": 0}),
        ("mask", {"mask": "thin"}),
    ]
    for name, wrong in cases:
        with pytest.raises(ValueError, match=f"^{name} must be"):
            PartialBinary(**{"salient": 0.1, **wrong})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="group: 24 does not divide the 64 inputs"):
        PartialBinary(0.1, group=24).layout(8, 64)
    scheme = PartialBinary(0.1)
    with pytest.raises(ValueError, match=r"^mask: binarises"):
        zeros = torch.zeros(8, 1)
        scheme.pack(torch.ones(8, 64, dtype=torch.bool), torch.zeros(8, 64, dtype=torch.uint8), zeros, zeros, zeros, zeros)
    with pytest.raises(ValueError, match="NaN"):
        scheme.choose(torch.full((8, 64), torch.nan))
