"""Optimisers of orthogonal matrices: against naive transcriptions of their equations, on Procrustes, and what they keep."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dither.quant.stiefel import CayleySGD, RiemannianAdam, canonical_square, cayley, nearest_orthogonal


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rotation(n: int, seed: int = 0) -> Tensor:
    q = torch.linalg.qr(draw(n, n, seed=seed)).Q
    q[:, 0] *= torch.linalg.det(q)  # of the component that a path from the identity reaches
    return q


def off(x: Tensor) -> float:
    return float(
        (x.detach().double().mT @ x.detach().double() - torch.eye(x.shape[-1], dtype=torch.float64)).abs().max()
    )


def procrustes(n: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """A, B and the X that makes ||X A - B|| zero."""
    x, a = rotation(n, seed), draw(n, 3 * n, seed=seed + 1)
    return a, x @ a, x


def test_adam_is_its_equations() -> None:
    """A naive transcription with explicit inverses, over 25 steps with a rate that changes: two stabilisations are among them."""
    n, b1, b2, eps = 6, 0.9, 0.999, 1e-8
    a, b, _ = procrustes(n, 1)
    x = rotation(n, 5)
    parameter = torch.nn.Parameter(x.clone())
    optimizer = RiemannianAdam([parameter], lr=0.05)
    m, v, eye = torch.zeros(n, n, dtype=x.dtype), 0.0, torch.eye(n, dtype=x.dtype)
    for t in range(1, 26):
        lr = 0.05 * (1 - t / 30)
        optimizer.param_groups[0]["lr"] = lr
        optimizer.zero_grad()
        (parameter @ a - b).square().sum().backward()
        optimizer.step()
        g = 2 * (x @ a - b) @ a.T
        d = g - x @ g.T @ x
        m = b1 * m + (1 - b1) * d
        v = b2 * v + (1 - b2) * float((d * d).sum() - 0.5 * ((x.T @ d) ** 2).sum())
        u = -lr * (m / (1 - b1**t)) / ((v / (1 - b2**t)) ** 0.5 + eps)
        skew = u @ x.T - x @ u.T
        moved = torch.linalg.inv(eye - skew / 2) @ (eye + skew / 2)
        x, m = moved @ x, moved @ m
        if t % 10 == 0:
            left, _, right = torch.linalg.svd(x)
            x = left @ right
            m = (m - x @ m.T @ x) / 2
        torch.testing.assert_close(parameter.detach(), x, rtol=0, atol=1e-11)


def test_euclidean_groups_are_adam() -> None:
    x = draw(7, seed=3)
    ours, theirs = torch.nn.Parameter(x.clone()), torch.nn.Parameter(x.clone())
    turned = torch.nn.Parameter(rotation(3))
    first = RiemannianAdam([{"params": [turned]}, {"params": [ours], "orthogonal": False, "lr": 0.01}])
    second = torch.optim.Adam([theirs], lr=0.01, betas=(0.9, 0.999), eps=1e-8)
    for _ in range(30):
        for p, optimizer in ((ours, first), (theirs, second)):
            optimizer.zero_grad()
            (p.cos().sum() + p.pow(4).sum()).backward()
            optimizer.step()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    assert torch.equal(turned, rotation(3))  # it never had a gradient


@pytest.mark.parametrize("n", [1, 2, 5, 24])
def test_adam_stays_orthogonal(n: int) -> None:
    parameter = torch.nn.Parameter(rotation(n, 1))
    optimizer = RiemannianAdam([parameter], lr=0.3)
    for t in range(57):
        parameter.grad = draw(n, n, seed=t)
        optimizer.step()
        assert off(parameter) < 1e-12


def test_cayley_maps() -> None:
    a = draw(2, 9, 9)
    a = a - a.mT
    x, m = torch.stack([rotation(9, 1), rotation(9, 2)]), draw(2, 9, 9, seed=4)
    turned, moved = cayley(a, x, m)
    assert off(turned[0]) < 1e-12 and off(turned[1]) < 1e-12
    torch.testing.assert_close(turned @ x.mT @ m, moved)  # one map for both
    d = (
        draw(9, 9) - x[0] @ draw(9, 9).T @ x[0]
    )  # of a tangent vector of a square X the canonical metric is half the Euclidean
    torch.testing.assert_close(canonical_square(x[0], d), d.square().sum().view(1, 1) / 2)
    torch.testing.assert_close(nearest_orthogonal(x * 1.5), x)


@pytest.mark.parametrize("kind", ["adam", "sgd"])
def test_procrustes(kind: str) -> None:
    a, b, best = procrustes(12, 7)
    parameter = torch.nn.Parameter(torch.eye(12, dtype=torch.float64))
    steps = 250
    made = RiemannianAdam([parameter], lr=0.1) if kind == "adam" else CayleySGD([parameter], lr=1.5, momentum=0.5)
    schedule = torch.optim.lr_scheduler.LambdaLR(made, lambda t: 1 - t / steps)
    for _ in range(steps):
        made.zero_grad()
        loss = (parameter @ a - b).square().mean()
        loss.backward()
        made.step()
        schedule.step()
    assert float((parameter.detach() - best).norm()) < 1e-3 * 12**0.5
    assert off(parameter) < (1e-12 if kind == "adam" else 1e-5)


def test_batches_are_their_matrices() -> None:
    """``[G, d, d]`` steps like G parameters: one second moment and one norm for each matrix."""
    start = torch.stack([rotation(4, s) for s in range(3)])
    for make in (lambda p: RiemannianAdam(p, lr=0.1), lambda p: CayleySGD(p, lr=0.1, momentum=0.9, seed=1)):
        whole, single = torch.nn.Parameter(start.clone()), [torch.nn.Parameter(x.clone()) for x in start]
        together, apart = make([whole]), [make([p]) for p in single]
        for t in range(23):
            g = draw(3, 4, 4, seed=t) * torch.tensor([1.0, 10.0, 100.0], dtype=torch.float64)[:, None, None]
            whole.grad = g
            together.step()
            for p, optimizer, one in zip(single, apart, g, strict=True):
                p.grad = one
                optimizer.step()
        torch.testing.assert_close(whole.detach(), torch.stack([p.detach() for p in single]), rtol=0, atol=1e-10)


def test_sgd_is_its_equations() -> None:
    n, lr, mu = 5, 0.3, 0.8
    x = rotation(n, 2)
    parameter, m = torch.nn.Parameter(x.clone()), torch.zeros(n, n, dtype=x.dtype)
    optimizer = CayleySGD([parameter], lr=lr, momentum=mu, seed=0)
    chance = torch.Generator().manual_seed(0)
    for t in range(300):
        g = draw(n, n, seed=t)
        parameter.grad = g.clone()
        optimizer.step()
        if int(torch.randint(101, (), generator=chance)) == 0:
            q, r = torch.linalg.qr(x)
            x = q @ torch.diag(r.diagonal().sign())
            assert off(x) < 1e-14
        m = mu * m - g
        what = m @ x.T - 0.5 * x @ (x.T @ m @ x.T)
        w = what - what.T
        alpha = min(lr, 1 / (float(torch.linalg.matrix_norm(w, 1)) + 1e-8))
        y = x + alpha * m
        for _ in range(5):
            y = x + alpha / 2 * w @ (x + y)
        x, m = y, w @ x
        torch.testing.assert_close(parameter.detach(), x, rtol=1e-8, atol=1e-9)


def test_sgd_with_enough_iterations_stays_orthogonal() -> None:
    parameter = torch.nn.Parameter(rotation(8))
    optimizer = CayleySGD([parameter], lr=0.1, momentum=0.9, iterations=60)
    for t in range(20):
        parameter.grad = draw(8, 8, seed=t)
        optimizer.step()
        assert off(parameter) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parameters_keep_their_type(dtype: torch.dtype) -> None:
    for make in (lambda p: RiemannianAdam(p, lr=0.1), lambda p: CayleySGD(p, lr=0.1)):
        parameter = torch.nn.Parameter(torch.eye(6, dtype=dtype))
        optimizer = make([parameter])
        for t in range(100):
            parameter.grad = draw(6, 6, seed=t).to(dtype)
            optimizer.step()
        assert parameter.dtype == dtype
        if dtype == torch.float32 and isinstance(optimizer, RiemannianAdam):
            assert off(parameter) < 1e-6


def test_state_is_saved_and_loaded() -> None:
    def run(optimizer: RiemannianAdam, p: torch.nn.Parameter, first: int, last: int) -> None:
        for t in range(first, last):
            p.grad = draw(4, 4, seed=t)
            optimizer.step()

    whole = torch.nn.Parameter(rotation(4))
    run(RiemannianAdam([whole], lr=0.1), whole, 0, 25)
    before = torch.nn.Parameter(rotation(4))
    half = RiemannianAdam([before], lr=0.1)
    run(half, before, 0, 13)
    after = torch.nn.Parameter(before.detach().clone())
    rest = RiemannianAdam([after], lr=0.5)
    rest.load_state_dict(half.state_dict())
    run(rest, after, 13, 25)
    assert torch.equal(after, whole)


def test_wrong_arguments() -> None:
    good = torch.nn.Parameter(torch.eye(3))
    for kind in (RiemannianAdam, CayleySGD):
        for bad, message in (
            (torch.ones(3), r"\[\.\.\., n, n\]"),
            (torch.ones(2, 3), "n, n"),
            (2 * torch.eye(3), "off by"),
        ):
            with pytest.raises(ValueError, match=message):
                kind([torch.nn.Parameter(bad)])
        with pytest.raises(ValueError, match="lr"):
            kind([good], lr=-1.0)
    with pytest.raises(ValueError, match="betas"):
        RiemannianAdam([good], betas=(1.0, 0.9))
    with pytest.raises(ValueError, match="stabilize"):
        RiemannianAdam([good], stabilize=0)
    with pytest.raises(ValueError, match="momentum"):
        CayleySGD([good], momentum=1.0)
    with pytest.raises(ValueError, match="iterations"):
        CayleySGD([good], iterations=0)
