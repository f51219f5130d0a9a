"""softmax along any axis of any tensor or array: against torch, its gradients by differences, and what it refuses."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.special
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dither.special import log_softmax, logsumexp, softmax
from dither.special.softmax import ALGORITHMS

PAIRS: list[tuple[Callable[..., Any], Callable[..., Tensor]]] = [
    (softmax, torch.softmax),
    (log_softmax, torch.log_softmax),
    (logsumexp, torch.logsumexp),
]


def close(found: Tensor, expected: Tensor) -> None:
    unit = torch.finfo(found.dtype).eps
    least = {2: 1e-6, 4: 1e-6, 8: 1e-14}[found.element_size()]
    torch.testing.assert_close(found.double(), expected, rtol=(10 if found.element_size() > 2 else 1.01) * unit, atol=least)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(1, 9), min_size=0, max_size=4), st.data())
def test_any_axis_and_strides(shape: list[int], data: st.DataObject) -> None:
    dim = data.draw(st.integers(-max(len(shape), 1), max(len(shape), 1) - 1))
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]))
    x = (torch.randn([2 * n for n in shape], generator=torch.Generator().manual_seed(sum(shape))) * 4).to(dtype)
    x = x[tuple(slice(None, None, 2) for _ in shape)].permute(data.draw(st.permutations(range(len(shape)))))
    before = x.clone()
    for ours, theirs in PAIRS:
        found = ours(x, dim)
        assert found.shape == theirs(x, dim).shape and found.dtype == dtype
        close(found, theirs(x.double(), dim))
    close(logsumexp(x, dim, keepdim=True), torch.logsumexp(x.double(), dim, keepdim=True))
    for ours in (softmax, log_softmax):
        expected = ours(x, dim)
        for out in (torch.empty_like(x), torch.empty(expected.mT.shape if x.dim() > 1 else x.shape, dtype=dtype)):
            out = out.mT if out.shape != x.shape else out
            assert ours(x, dim, out=out) is out and torch.equal(out, expected)
        assert torch.equal(x, before)
        assert torch.equal(ours(x, dim, out=x), expected)  # in place, whatever the strides
        x.copy_(before)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_numpy(algorithm: str) -> None:
    g = np.random.default_rng(0)
    for dtype in (np.float32, np.float64, np.float16):
        for x in (g.normal(size=(5, 7)), g.normal(size=(5, 14))[::-1, ::-2], np.asfortranarray(g.normal(size=(5, 7)))):
            x = x.astype(dtype, order="K")
            x.flags.writeable = False
            for axis in (0, 1, -1):
                y = softmax(x, axis, algorithm)
                assert isinstance(y, np.ndarray) and y.dtype == dtype
                tolerance = 1e-3 if dtype == np.float16 else 1e-6
                np.testing.assert_allclose(y, scipy.special.softmax(x.astype(np.float64), axis), rtol=tolerance)
                np.testing.assert_allclose(log_softmax(x, axis), scipy.special.log_softmax(x.astype(np.float64), axis), rtol=2 * tolerance)
                sums = logsumexp(x, axis)
                assert isinstance(sums, np.ndarray) and sums.dtype == dtype
                np.testing.assert_allclose(sums, scipy.special.logsumexp(x.astype(np.float64), axis), rtol=2 * tolerance)
    x = g.normal(size=(4, 6)).astype(np.float32)
    out = np.empty_like(x)
    assert softmax(x, algorithm=algorithm, out=out) is out and np.array_equal(out, softmax(x, algorithm=algorithm))
    assert softmax(x.astype(">f4"), algorithm=algorithm).tobytes() == out.tobytes()


def test_gradients() -> None:
    x = torch.randn(3, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    for dim in (0, 1, -1):
        for algorithm in ALGORITHMS:
            assert torch.autograd.gradcheck(lambda x, d=dim, a=algorithm: softmax(x, d, a), (x,))
        assert torch.autograd.gradcheck(lambda x, d=dim: log_softmax(x, d), (x,))
        assert torch.autograd.gradcheck(lambda x, d=dim: logsumexp(x, d), (x,))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for ours, theirs in PAIRS:
            mine, other = (x.detach().to(dtype).requires_grad_() for _ in range(2))
            for function, leaf in ((ours, mine), (theirs, other)):
                y = function(leaf, 1)
                (y * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum().backward()
            assert mine.grad is not None and other.grad is not None and mine.grad.dtype == dtype
            single = dtype == torch.float32
            torch.testing.assert_close(mine.grad, other.grad, rtol=1e-5 if single else 0.02, atol=2e-6 if single else 0.01)
    with torch.no_grad():
        assert not softmax(x).requires_grad
    y = softmax(x)
    (first,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_sums_wider_than_the_row() -> None:
    x = torch.randn(4, 3000, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    wide = logsumexp(x, dtype=torch.float32)
    assert wide.dtype == torch.float32
    torch.testing.assert_close(wide, x.double().logsumexp(-1).float(), rtol=3e-7, atol=0)
    assert logsumexp(x.requires_grad_(), dtype=torch.float32).requires_grad


@pytest.mark.parametrize("function", [softmax, log_softmax, logsumexp])
def test_elsewhere_torch_does_it(function: Callable[..., Any]) -> None:
    x = torch.empty(3, 4, device="meta")
    assert function(x, 0).device.type == "meta"
    assert function(x, 0).shape == ((4,) if function is logsumexp else (3, 4))


def test_long_rows_and_stream() -> None:
    x = torch.randn(1, 3_000_000, generator=torch.Generator().manual_seed(0))
    for y in (softmax(x), softmax(x, stream=True), softmax(x.view(-1, 1), 0, stream=True).view(1, -1)):
        torch.testing.assert_close(y, x.double().softmax(-1).float(), rtol=3e-6, atol=0)
    short = x[:, :100]
    assert torch.equal(softmax(short, stream=True), softmax(short, algorithm="two_pass"))  # not "reload", which reads what it wrote
    torch.testing.assert_close(log_softmax(short, stream=True), short.log_softmax(-1))


def test_nothing_beside_the_axis() -> None:
    x = torch.zeros(0, 3, 5)
    assert softmax(x).shape == log_softmax(x, 1).shape == (0, 3, 5) and logsumexp(x).shape == (0, 3)
    assert float(softmax(torch.tensor(2.0))) == 1 and float(logsumexp(torch.tensor(2.0))) == 2 and float(log_softmax(torch.tensor(2.0))) == 0
    assert softmax(torch.tensor(math.inf)).isnan() and logsumexp(torch.tensor(-math.inf), 0) == -math.inf


def test_wrong_arguments() -> None:
    x = torch.zeros(3, 4)
    for function in (softmax, log_softmax, logsumexp):
        for name, call in [
            ("x", lambda f=function: f(x.int())),
            ("x", lambda f=function: f(torch.zeros(3, dtype=torch.complex64))),
            ("x", lambda f=function: f(np.zeros(3, int))),
            ("x", lambda f=function: f(x.to_sparse())),
            ("dim", lambda f=function: f(x, 2)),
            ("dim", lambda f=function: f(x, -3)),
            ("dim", lambda f=function: f(torch.tensor(1.0), 1)),
            ("dim", lambda f=function: f(x, 1.0)),
            ("dim", lambda f=function: f(torch.zeros(3, 0))),
            ("dim", lambda f=function: f(np.zeros((0, 3)), 0)),
        ]:
            with pytest.raises(ValueError, match=f"^{name}: "):
                call()
        with pytest.raises(TypeError, match=r"^x: "):
            function([1.0, 2.0])
    buffer, frozen = torch.zeros(40), np.zeros((3, 4), np.float32)
    frozen.flags.writeable = False
    for name, call in [
        ("algorithm", lambda: softmax(x, algorithm="three_pass")),
        ("stream", lambda: softmax(x, algorithm="reload", stream=True)),
        ("out", lambda: softmax(x, out=torch.zeros(4, 3))),
        ("out", lambda: softmax(x, out=torch.zeros(3, 4, dtype=torch.float64))),
        ("out", lambda: softmax(x, out=torch.zeros(3, 4, device="meta"))),
        ("out", lambda: softmax(x, out=np.zeros((3, 4), np.float32))),
        ("out", lambda: softmax(frozen, out=frozen)),
        ("out", lambda: log_softmax(buffer[:12].view(3, 4), out=buffer[4:16].view(3, 4))),
        ("out", lambda: log_softmax(buffer[:16].view(4, 4), out=buffer[:16].view(4, 4).T)),
        ("out", lambda: softmax(x, out=torch.zeros(3, 1).expand(3, 4))),
        ("out", lambda: softmax(x.clone().requires_grad_(), out=torch.zeros(3, 4))),
        ("dtype", lambda: logsumexp(x, dtype=torch.int32)),
        ("dtype", lambda: logsumexp(np.zeros(3, np.float32), dtype=torch.bfloat16)),
    ]:
        with pytest.raises(ValueError, match=f"^{name}: "):
            call()
