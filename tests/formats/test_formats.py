"""Formats, packing and clipping against independent truths: other libraries, closed forms, direct computation."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dither.formats import MXFP4, NVFP4, Clip, Float, Int, QTensor, Scheme, group
from dither.formats.clip import clip_search
from dither.formats.packing import pack_rows, unpack_rows


@pytest.mark.parametrize("bits", range(1, 9))
@settings(max_examples=8, deadline=None)
@given(data=st.data(), rows=st.integers(0, 4), columns=st.integers(0, 70))
def test_packing_is_an_lsb_first_stream(bits: int, data: st.DataObject, rows: int, columns: int) -> None:
    codes = np.array([[data.draw(st.integers(0, 2**bits - 1)) for _ in range(columns)] for _ in range(rows)], dtype=np.uint8)
    packed = pack_rows(torch.from_numpy(codes.reshape(rows, columns)), bits)
    assert packed.shape == (rows, -(-columns * bits // 32) * 4)
    for row, stored in zip(codes, packed.tolist(), strict=True):
        number = sum(int(c) << (k * bits) for k, c in enumerate(row))
        assert int.from_bytes(bytes(stored), "little") == number
    assert np.array_equal(unpack_rows(packed, bits, columns).numpy(), codes.reshape(rows, columns))


@pytest.mark.parametrize("scheme", [MXFP4, NVFP4], ids=str)
@pytest.mark.parametrize("shape", [(5, 48), (7, 50), (1, 1), (0, 16), (3, 0)])
def test_every_stored_byte_counts(scheme: Scheme, shape: tuple[int, int], tmp_path: object) -> None:
    w = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    params = scheme.fit(w)
    held = QTensor.from_codes(scheme.encode(w, params), params, scheme)
    assert held.nbytes == scheme.nbytes(*shape) == sum(t.numel() * t.element_size() for t in held.tensors().values())
    assert held.bits == pytest.approx(scheme.bits_per_weight(*shape))
    path = f"{tmp_path}/t.safetensors"
    held.save(path)
    again = QTensor.load(path)
    assert torch.equal(again.dequantize(), held.dequantize()) and again.scheme == scheme
    assert torch.allclose(held.dequantize(), scheme.quantize(w, params), rtol=1e-6, atol=1e-7)
    assert Scheme.from_json(scheme.to_json()) == scheme


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_is_refused_by_place(bad: float) -> None:
    w = torch.zeros(3, 4)
    w[1, 2] = bad
    with pytest.raises(ValueError, match="row 1, column 2"):
        (Int(4) @ group(2)).fit(w)


@pytest.mark.parametrize(
    ("fmt", "dtype"),
    [(Float(2, 1), ml_dtypes.float4_e2m1fn), (Float(2, 3), ml_dtypes.float6_e2m3fn), (Float(3, 2), ml_dtypes.float6_e3m2fn),
     (Float(4, 3), ml_dtypes.float8_e4m3fn), (Float(5, 2, finite=False), ml_dtypes.float8_e5m2)],
    ids=str,
)
def test_floats_equal_ml_dtypes_bit_for_bit(fmt: Float, dtype: type) -> None:
    grid = fmt.values()[0].numpy()
    middles = (grid[1:] + grid[:-1]) / 2
    random = np.random.default_rng(0).normal(size=20000) * np.exp(np.random.default_rng(1).uniform(-12, 12, 20000))
    x = np.concatenate([grid, middles, np.nextafter(middles, 9e9), np.nextafter(middles, -9e9), random])
    x = x[np.abs(x) <= fmt.largest].astype(np.float32)
    codes = fmt.encode(torch.from_numpy(x)[None], {"scale": torch.ones(1)})[0].numpy()
    assert np.array_equal(codes, x.astype(dtype).view(np.uint8))
    assert int(fmt.encode(torch.tensor([[1e30]]), {"scale": torch.ones(1)})) == int(fmt.values()[1][-1])


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_asymmetric_equals_torch_fake_quantize(bits: int) -> None:
    w = torch.randn(64, 40, generator=torch.Generator().manual_seed(bits))
    fmt = Int(bits, scale="float32")
    p = fmt.fit(w)
    expected = torch.fake_quantize_per_channel_affine(w, p["scale"], p["zero_point"].int(), 0, 0, 2**bits - 1)
    # torch multiplies by the reciprocal of the scale: at ties the two may differ by one step
    different = (fmt.quantize(w, p) - expected).abs() > 1e-6
    assert float(different.float().mean()) < 1e-3


@pytest.mark.parametrize(("bits", "mse"), [(2, 0.11885), (3, 0.03744), (4, 0.01154)])
def test_gaussian_closed_forms(bits: int, mse: float) -> None:
    """Max's optimal uniform quantizers: float offset, range chosen at p = 2, one block of a million samples (two end points clipped alike)."""
    x = torch.randn(1, 1, 400_000, generator=torch.Generator().manual_seed(0))
    bound = float(x.abs().max())
    x[..., 0], x[..., 1] = bound, -bound  # so that both ends shrink alike
    fmt = Int(bits, zero="float", scale="float32")
    best = clip_search(x, fmt, Clip(p=2, grid=400, shrink=0.9))
    assert float((fmt.quantize(x, best) - x).square().mean()) == pytest.approx(mse, rel=0.02)


def test_high_resolution_limit() -> None:
    x = torch.rand(1, 500_000, generator=torch.Generator().manual_seed(0))
    fmt = Int(8, zero="float", scale="float32")
    p = fmt.fit(x)
    assert float((fmt.quantize(x, p) - x).double().square().mean()) == pytest.approx(float(p["scale"]) ** 2 / 12, rel=0.01)


@pytest.mark.parametrize("clip", [Clip(), Clip(p=2, grid=20, shrink=0.5), Clip(p=2, grid=10, mode="2d")])
def test_clipping_is_never_worse_in_its_norm(clip: Clip) -> None:
    w = torch.randn(32, 128, generator=torch.Generator().manual_seed(3)) ** 3
    scheme = Int(3) @ group(32)
    plain, best = scheme.quantize(w), scheme.quantize(w, scheme.fit(w, clip=clip))

    def error(q: torch.Tensor) -> torch.Tensor:
        return (q - w).abs().pow(clip.p).view(32, 4, 32).sum(-1)

    assert bool((error(best) <= error(plain) * (1 + 1e-6)).all()) and float(error(best).sum()) < float(error(plain).sum())


def test_gram_weighted_clipping_minimises_the_output_error() -> None:
    g = torch.Generator().manual_seed(5)
    w, x = torch.randn(16, 64, generator=g) ** 3, torch.randn(500, 64, generator=g) * torch.linspace(0.1, 3, 64)
    gram = torch.stack([x[:, k : k + 32].T @ x[:, k : k + 32] / 500 for k in (0, 32)])
    scheme = Int(3) @ group(32)
    clip = Clip(p=2, grid=20, shrink=0.5)
    best = scheme.quantize(w, scheme.fit(w, gram=[gram], clip=clip)) - w
    direct = [(x[:, k : k + 32] @ best[:, k : k + 32].T).square().mean(0) for k in (0, 32)]
    for i in range(10):
        p = 1 - i / 20
        blocks = w.view(16, 2, 32)
        lo, hi = scheme.format.range(blocks)
        other = scheme.format.quantize(blocks, scheme.format.params(lo * p, hi * p)) - blocks
        for k in range(2):
            assert bool(((x[:, 32 * k : 32 * k + 32] @ other[:, k].T).square().mean(0) >= direct[k] * (1 - 1e-4)).all())


@pytest.mark.parametrize("bits", [0, 9, -1, True, 2.5])
def test_bits_out_of_range(bits: object) -> None:
    with pytest.raises(ValueError, match="bits must be 1 to 8"):
        Int(bits)  # type: ignore[arg-type]


def test_ragged_groups_are_blocks_of_their_own() -> None:
    w = torch.randn(8, 576, generator=torch.Generator().manual_seed(0))
    scheme = Int(4) @ group(128)
    assert scheme.fit(w)["scale"].shape == (8, 5) and scheme.is_ragged(576) and not scheme.is_ragged(512)
    alone = (Int(4) @ group(64)).quantize(w[:, 512:])
    assert torch.equal(scheme.quantize(w)[:, 512:], alone)
