"""Causal attention against torch's own in float64: the torch reference in float64, the C++ kernel in bfloat16."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from dither.kernels import attention_reference, causal_attention
from dither.kernels.attention import _native
from dither.kernels.attention_reference import causal_attention_reference

SHAPES = [(1, 9, 3, 512, 64), (2, 4, 4, 300, 16), (1, 2, 1, 129, 8), (3, 6, 2, 64, 24), (1, 1, 1, 1, 4), (1, 1, 1, 49, 2)]  # B, H, G, T, d


def operands(
    shape: tuple[int, int, int, int, int], dtype: torch.dtype, grad: bool = False, wider: int = 2, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    batch, heads, groups, length, width = shape
    g = torch.Generator().manual_seed(seed)

    def make(count: int, features: int) -> Tensor:  # heads behind tokens in memory, as models make them
        x = torch.randn(batch, length, count, features, generator=g, dtype=torch.float64).to(dtype).transpose(1, 2)
        return x.requires_grad_(grad)

    return make(heads, width), make(groups, width), make(groups, width + wider)


def exact(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    q, k, v = q.double(), k.double(), v.double()
    repeats = q.shape[1] // k.shape[1]
    return functional.scaled_dot_product_attention(
        q, k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1), is_causal=True, scale=scale
    )


def needs_kernel() -> None:
    if _native(torch.zeros(1, 1, 1, 2, dtype=torch.bfloat16)) is None:
        pytest.skip("the C++ extension or AVX512_BF16 is missing")


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale", [None, 0.3])
def test_the_reference_is_attention_over_everything(shape: tuple[int, int, int, int, int], scale: float | None) -> None:
    q, k, v = operands(shape, torch.float64)
    assert torch.allclose(causal_attention(q, k, v, scale), exact(q, k, v, scale), atol=1e-12)


@pytest.mark.parametrize("piece", [16, 128])
def test_pieces_change_nothing(piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_reference, "PIECE", piece)
    monkeypatch.setattr(attention_reference, "ROWS", 1)
    q, k, v = operands((1, 4, 2, 200, 8), torch.float64)
    assert torch.allclose(causal_attention(q, k, v), exact(q, k, v), atol=1e-12)


def test_gradients_pass() -> None:
    q, k, v = operands((1, 4, 2, 150, 8), torch.float64, grad=True)
    weights = torch.randn(1, 4, 150, 10, dtype=torch.float64)
    found = torch.autograd.grad((causal_attention(q, k, v) * weights).sum(), (q, k, v))
    wanted = torch.autograd.grad((exact(q, k, v) * weights).sum(), (q, k, v))
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(found, wanted, strict=True))


def test_gradients_pass_in_bfloat16() -> None:
    q, k, v = operands((1, 2, 1, 60, 8), torch.bfloat16, grad=True)
    assert torch.autograd.grad(causal_attention(q, k, v).float().sum(), q)[0].shape == q.shape
    with torch.no_grad():
        assert not causal_attention(q, k, v).requires_grad


def rounding(v: Tensor) -> float:
    """What rounding probabilities and the result to bfloat16 (8 bits) can add, whatever the logits: 2^-9 of the largest value each, and a
    little for sums."""
    return 2.5 * 2**-9 * float(v.abs().max())


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_kernel(shape: tuple[int, int, int, int, int], threads: int) -> None:
    needs_kernel()
    torch.set_num_threads(threads)
    q, k, v = operands(shape, torch.bfloat16)
    found = causal_attention(q, k, v, 0.2)
    assert found.shape == (*q.shape[:3], v.shape[-1]) and found.dtype == torch.bfloat16
    assert found.transpose(1, 2).is_contiguous()
    assert float((found.double() - exact(q, k, v, 0.2)).abs().max()) <= rounding(v)


@settings(deadline=None, max_examples=60)
@given(
    batch=st.integers(1, 3), shared=st.integers(1, 3), groups=st.integers(1, 3), length=st.integers(1, 140), half=st.integers(1, 40),
    wider=st.integers(-1, 70), scale=st.floats(-2, 2), seed=st.integers(0, 99),
)
def test_the_kernel_on_any_shape(batch: int, shared: int, groups: int, length: int, half: int, wider: int, scale: float, seed: int) -> None:
    needs_kernel()
    q, k, v = operands((batch, shared * groups, groups, length, 2 * half), torch.bfloat16, wider=wider, seed=seed)
    found = causal_attention(q, k, v, scale)
    wanted = exact(q.double() * scale, k, v, 1.0)  # torch masks before it scales: NaN for a scale below 0
    spread = 2**-20 * abs(scale) * float(q.double().norm(dim=-1).max() * k.double().norm(dim=-1).max())  # of float32 logits
    assert float((found.double() - wanted).abs().max()) <= rounding(v) + 2 * spread * float(v.abs().max())


def test_any_strides_of_batches_heads_and_tokens() -> None:
    needs_kernel()
    q, k, v = operands((2, 4, 2, 70, 8), torch.bfloat16)
    wanted = causal_attention(q, k, v)
    assert torch.equal(causal_attention(q.contiguous(), k.contiguous(), v.contiguous()), wanted)
    spaced = torch.empty(2, 2, 70, 32, dtype=torch.bfloat16)[..., ::2][..., :8].copy_(k)  # features that are not dense are copied
    assert torch.equal(causal_attention(q, spaced, v), wanted)
    odd = torch.empty(4 * 2 * 70 * 8 + 1, dtype=torch.bfloat16)[1:].view(2, 4, 70, 8).copy_(q)  # rows at odd addresses
    assert torch.equal(causal_attention(odd, k, v), wanted)


def test_no_key_is_seen_before_its_turn() -> None:
    needs_kernel()
    q, k, v = operands((1, 2, 2, 101, 8), torch.bfloat16)
    before = causal_attention(q, k, v)
    for t in (0, 15, 16, 63, 64, 100):
        k2, v2 = k.clone(), v.clone()
        k2[:, :, t:], v2[:, :, t:] = 1e4, 1e30
        after = causal_attention(q, k2, v2)
        assert torch.equal(after[:, :, :t], before[:, :, :t])
        assert not torch.isclose(after[:, :, t], before[:, :, t]).any()


def test_nan_stays_in_sight() -> None:
    needs_kernel()
    q, k, v = operands((1, 2, 2, 40, 8), torch.bfloat16)
    k[:, 1, 20] = math.nan
    found = causal_attention(q, k, v)
    assert bool(found[:, 1, 20:].isnan().all()) and bool(found[:, 0].isfinite().all()) and bool(found[:, 1, :20].isfinite().all())


def test_large_logits_and_values_do_not_overflow() -> None:
    needs_kernel()
    q, k, v = operands((1, 1, 1, 40, 4), torch.bfloat16)
    found = causal_attention(q * 1e15, k * 1e15, v * 1e30)
    assert bool(found.isfinite().all())
    assert torch.equal(found[0, 0, 0], (v * 1e30)[0, 0, 0])  # the first query sees one key


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda q, k, v: (q[0], k, v), "q: shape"),
        (lambda q, k, v: (q, k[:, :, :3], v), "k: shape"),
        (lambda q, k, v: (q, k.repeat(1, 3, 1, 1), v.repeat(1, 3, 1, 1)), "k: shape"),
        (lambda q, k, v: (q, k, v[:, :, :3]), "v: shape"),
        (lambda q, k, v: (q, k.float(), v), "k: torch.float32"),
    ],
)
def test_refuses_what_does_not_fit(change: object, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        causal_attention(*change(*operands((1, 4, 2, 9, 4), torch.bfloat16)))  # type: ignore[operator]


def test_the_reference_runs_where_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = operands((1, 2, 1, 30, 4), torch.bfloat16)
    monkeypatch.setenv("DITHER_KERNELS", "reference")
    assert torch.equal(causal_attention(q, k, v), causal_attention_reference(q, k, v, 0.5))
