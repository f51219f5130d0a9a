"""Where rotations of heads start: the paper's KLT and Hadamard, from the right slices of the reader's columns."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dither.graph import discover_block, find_head_rotations, rotate_heads
from dither.quant.transforms.heads import klt, start_heads


class Attention(nn.Module):
    """Two heads of values, ``size`` wide, read by four heads of queries."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        self.value, self.out, self.mix = nn.Linear(10, 2 * size), nn.Linear(4 * size, 9), nn.Linear(10, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # [T, 10]
        v = self.value(x).view(len(x), 2, self.size).repeat_interleave(2, 1)  # [T, 4, d]
        weight = self.mix(x).T.softmax(-1)  # [4, T]
        return self.out((v * (1 + weight.T[..., None])).flatten(1))


def made(size: int) -> tuple[Attention, list, object]:
    torch.manual_seed(0)
    module = Attention(size).double()
    calls = [((torch.randn(12, 10, dtype=torch.float64),), {})]
    (rotation,) = [
        r for r in find_head_rotations(module, calls, discover_block(module, calls)) if r.site.producer.name == "value"
    ]
    assert (rotation.heads, rotation.size) == (2, size)
    return module, calls, rotation


@pytest.mark.parametrize("size", [4, 12, 6])  # 6: no Hadamard matrix of that order
@pytest.mark.parametrize("start", ["klt+hadamard", "hadamard"])
def test_orthogonal_and_exact(size: int, start: str) -> None:
    module, calls, rotation = made(size)
    r = start_heads(module, rotation, start, seed=3)
    torch.testing.assert_close(r @ r.mT, torch.eye(size, dtype=torch.float64).expand(2, -1, -1))
    assert torch.equal(r, start_heads(module, rotation, start, seed=3))
    assert not torch.equal(r[0], r[1])
    before = module(*calls[0][0])
    rotate_heads(module, rotation, r)
    torch.testing.assert_close(module(*calls[0][0]), before, rtol=0, atol=1e-12)


def test_klt_then_hadamard_makes_variances_equal() -> None:
    """Of the rows of W_o that belong to one head: the covariance of W_o R has a constant diagonal."""
    module, _, rotation = made(12)
    rotate_heads(module, rotation, start_heads(module, rotation))
    w = module.out.weight.detach()
    for g in range(2):
        rows = torch.cat(
            [w[:, 12 * h : 12 * h + 12] for h in (2 * g, 2 * g + 1)]
        )  # query heads 2 g and 2 g + 1 read head g
        variance = rows.var(0, correction=0)
        torch.testing.assert_close(variance, variance.mean().expand(12))


def test_klt_decorrelates() -> None:
    x = torch.randn(50, 5, dtype=torch.float64) @ torch.randn(5, 5, dtype=torch.float64) + 3
    covariance = torch.cov((x @ klt(x)).T)
    torch.testing.assert_close(covariance, torch.diag(covariance.diagonal()))


def test_unknown_start() -> None:
    module, _, rotation = made(4)
    with pytest.raises(ValueError, match="identity"):
        start_heads(module, rotation, "identity")
