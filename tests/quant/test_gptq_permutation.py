"""GPTQ with act-order does not care how its inputs are numbered: permuting the inputs of (W, H) permutes the result and nothing else.

With one grid a row, any permutation of the inputs permutes the codes and leaves the grids alone. With static groups a grid belongs to the
inputs of its group, so the permutations are those that keep each group's inputs together: the groups change places, and inputs change
places inside their group. The codes follow the inputs, the grids follow the groups.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dither.formats import Int, QTensor, Scheme, channel, group
from dither.quant.rounding.columns import columns
from kernels.problems import hessian

INPUTS, SIZE = 96, 16


def problem(seed: int) -> tuple[Tensor, Tensor]:
    """``W [24, I]`` and a Hessian of correlated inputs, float64; no two entries of its diagonal are equal."""
    w = torch.randn(24, INPUTS, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    h = hessian(INPUTS, seed, damp=0)
    assert len(h.diagonal().unique()) == INPUTS
    return w, h


def permuted(w: Tensor, h: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
    return w[:, order].contiguous(), h[order][:, order].contiguous()


def anywhere(seed: int) -> Tensor:
    return torch.randperm(INPUTS, generator=torch.Generator().manual_seed(seed))


def group_by_group(seed: int) -> tuple[Tensor, Tensor]:
    """A permutation of the inputs that keeps groups together, and the permutation of the groups that it makes."""
    draw = torch.Generator().manual_seed(seed)
    groups = torch.randperm(INPUTS // SIZE, generator=draw)
    inside = [torch.randperm(SIZE, generator=draw) for _ in groups]
    return torch.cat([g * SIZE + p for g, p in zip(groups, inside, strict=True)]), groups


@pytest.fixture(params=["default", "reference"], autouse=True)
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both the kernel that users get and its reference."""
    if request.param == "reference":
        monkeypatch.setenv("DITHER_KERNELS", "reference")
    else:
        monkeypatch.delenv("DITHER_KERNELS", raising=False)


def same_grids(a: QTensor, b: QTensor, groups: Tensor | None = None) -> bool:
    return a.params.keys() == b.params.keys() and all(
        torch.equal(a.params[k] if groups is None else a.params[k][:, groups], b.params[k]) for k in a.params
    )


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_one_grid_a_row_any_permutation(bits: int, seed: int) -> None:
    w, h = problem(seed)
    order, scheme = anywhere(seed + 100), Int(bits) @ channel()
    plain, moved = columns(w, h, scheme), columns(*permuted(w, h, order), scheme)
    assert torch.equal(plain.codes[:, order], moved.codes)
    assert same_grids(plain, moved)


@pytest.mark.parametrize("seed", range(5))
def test_static_groups_move_as_a_whole(seed: int) -> None:
    w, h = problem(seed)
    (order, groups), scheme = group_by_group(seed + 100), Int(3) @ group(SIZE)
    plain, moved = columns(w, h, scheme), columns(*permuted(w, h, order), scheme)
    assert torch.equal(plain.codes[:, order], moved.codes)
    assert same_grids(plain, moved, groups)


def test_inputs_that_were_always_zero_may_lie_anywhere() -> None:
    """Their diagonals are equal, so their order among themselves is undecided; it must not show."""
    w, h = problem(0)
    dead = torch.tensor([3, 17, 40, 41, 90])
    h[dead] = 0
    h[:, dead] = 0
    order, scheme = anywhere(1), Int(3) @ channel()
    plain, moved = columns(w, h, scheme), columns(*permuted(w, h, order), scheme)
    assert torch.equal(plain.codes[:, order], moved.codes)
    assert bool((plain.dequantize()[:, dead] == 0).all())


@pytest.mark.parametrize("scheme", [Int(3) @ channel(), Int(3) @ group(SIZE)], ids=str)
def test_without_act_order_the_numbering_matters(scheme: Scheme) -> None:
    """Else the tests above would show nothing."""
    w, h = problem(0)
    order, _ = group_by_group(1)
    plain = columns(w, h, scheme, act_order=False)
    moved = columns(*permuted(w, h, order), scheme, act_order=False)
    assert not torch.equal(plain.codes[:, order], moved.codes)
