"""Products with packed weights in Triton against float64: every way to cut a problem, widths, groups, ragged sizes, types. On the GPU where there is
one, else in the interpreter."""

from __future__ import annotations

import pytest
import torch

from kernels.gpu_problems import DEVICE, check, packed_problem

pytest.importorskip("triton")

from dither.kernels.gpu import plans
from dither.kernels.gpu.packed_matmul import candidates, packed_matmul
from dither.kernels.gpu.tuning import Plan

WHOLE = 1 << 20
ROW = Plan("row", block_o=4, block_t=1, block_k=256, stages=1)
TILE = Plan("tile", 64, 16, 64, 1)
PARTS = Plan("tile", 64, 16, 64, 3)
DECODE = Plan("decode", block_o=16, block_k=256)
PLANS = pytest.mark.parametrize("plan", [ROW, TILE, PARTS, DECODE], ids=["row", "tile", "parts", "decode"])
WIDTHS = pytest.mark.parametrize("bits", [2, 4, 8])


@PLANS
@WIDTHS
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(("rows", "columns", "group"), [(65, 256, 64), (7, 130, 32), (33, 257, WHOLE), (20, 1000, 128), (1, 5, 16)])
def test_against_float64(plan: Plan, bits: int, symmetric: bool, rows: int, columns: int, group: int) -> None:
    problem = packed_problem(rows, columns, bits, group, 3, symmetric=symmetric)
    check(problem, packed_matmul(*problem.arguments(), plan), weights_rounded=plan.kind != "row")


@PLANS
@pytest.mark.parametrize("group", [16, 32, 64, 128, 256, 512, WHOLE])
def test_groups_of_every_size(plan: Plan, group: int) -> None:
    problem = packed_problem(9, 600, 4, group, 2)
    check(problem, packed_matmul(*problem.arguments(), plan), weights_rounded=plan.kind != "row")


@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 5, 8, 15, 16, 17, 31, 32, 33])
def test_rows_of_every_number_by_the_plan_taken(tokens: int) -> None:
    problem = packed_problem(70, 320, 4, 64, tokens)
    check(problem, packed_matmul(*problem.arguments()), weights_rounded=True)


@pytest.mark.parametrize("tokens", [1, 3, 20, 70, 130])
def test_every_plan_that_may_be_taken(tokens: int) -> None:
    problem = packed_problem(66, 320, 4, 64, tokens)
    found = candidates(problem.x, 66, 4)
    assert 1 < len(found) <= 8
    for plan in found:
        check(problem, packed_matmul(*problem.arguments(), plan), weights_rounded=plan.kind != "row")


@PLANS
@pytest.mark.parametrize("scale", [torch.float16, torch.bfloat16, torch.float32])
def test_scales_of_every_type(plan: Plan, scale: torch.dtype) -> None:
    problem = packed_problem(12, 192, 4, 64, 2, scale=scale)
    check(problem, packed_matmul(*problem.arguments(), plan), weights_rounded=plan.kind != "row")


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("tokens", [1, 3, 9])
def test_inputs_of_every_type(dtype: torch.dtype, tokens: int) -> None:
    problem = packed_problem(20, 300, 4, 32, tokens, dtype=dtype)
    found = candidates(problem.x, 20, 4)
    assert dtype != torch.float32 or all(plan.kind != "tile" for plan in found)  # tensor cores would round it
    for plan in found:
        check(problem, packed_matmul(*problem.arguments(), plan), weights_rounded=True)


@PLANS
def test_memory_that_is_aligned_to_nothing(plan: Plan) -> None:
    problem = packed_problem(17, 100, 4, 32, 3)
    for shift in (1, 2, 3):
        memory = torch.zeros(problem.packed.numel() + shift, dtype=torch.uint8, device=DEVICE)
        moved = memory[shift:].view(problem.packed.shape)
        moved.copy_(problem.packed)
        check(problem, packed_matmul(problem.x, moved, *problem.arguments()[2:], plan), weights_rounded=plan.kind != "row")


def test_the_same_bits_each_time() -> None:
    problem = packed_problem(20, 300, 4, 64, 5)
    first = packed_matmul(*problem.arguments(), PARTS)
    assert all(torch.equal(packed_matmul(*problem.arguments(), PARTS), first) for _ in range(3))


@PLANS
def test_nan_stays_in_its_row(plan: Plan) -> None:
    problem = packed_problem(8, 128, 4, 64, 3)
    problem.x[1, 70] = float("nan")
    found = packed_matmul(*problem.arguments(), plan)
    assert bool(found[1].isnan().all()) and bool(found[0].isfinite().all()) and bool(found[2].isfinite().all())


@WIDTHS
def test_nothing_to_multiply(bits: int) -> None:
    problem = packed_problem(8, 128, bits, 64, 1)
    assert packed_matmul(problem.x[:0], *problem.arguments()[1:]).shape == (0, 8)


def test_what_is_refused() -> None:
    problem = packed_problem(4, 128, 4, 64, 2)
    given = dict(zip(("x", "packed", "scale", "zero", "bits", "group"), problem.arguments(), strict=True))
    assert problem.zero is not None
    for wrong, message in (
        ({"x": problem.x[:, :100].clone()}, "packed"),
        ({"x": problem.x.double()}, "x: dtype"),
        ({"bits": 3}, "bits, group"),
        ({"group": 24}, "bits, group"),
        ({"group": 8}, "bits, group"),
        ({"scale": problem.scale[:, :1].clone()}, "scale"),
        ({"zero": problem.zero[:-1].clone()}, "zero"),
        ({"x": problem.x.to("meta")}, "one device"),
    ):
        with pytest.raises(ValueError, match=message):
            packed_matmul(**(given | wrong))  # type: ignore[arg-type]


@pytest.mark.parametrize("tokens", [1, 16, 40, 300, 5000])
@pytest.mark.parametrize(("outputs", "columns"), [(4096, 4096), (576, 1536), (128256, 2048), (1, 16)])
def test_plans_are_few_and_sound(tokens: int, outputs: int, columns: int) -> None:
    found = plans.tile_plans(tokens, outputs, columns, 132, narrow=False)
    assert 1 <= len(found) <= 6 and len(set(found)) == len(found)
    for plan in found:
        assert plan.block_o * plan.warps and all(n >= 16 and n & (n - 1) == 0 for n in (plan.block_o, plan.block_t, plan.block_k))
        steps, parts = plans.cut(columns, plan.block_k, plan.parts)
        assert (parts - 1) * steps * plan.block_k < columns <= parts * steps * plan.block_k  # nothing missing, no part empty
        tiles = -(-outputs // plan.block_o) * -(-tokens // plan.block_t)
        assert parts == 1 or tiles < 4 * 132
