"""Problems for the GPU kernels, on the GPU where there is one, else for Triton's interpreter on the CPU."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dither.kernels import pack_rows

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# bfloat16 keeps 8 bits: half a unit is 2^-9 of a value just below a power of two and 2^-8 just above; the interpreter cuts off, a whole unit
UNIT = 2.0**-8 if DEVICE == "cuda" else 2.0**-7


class Packed(NamedTuple):
    """Arguments of a product, and its weights in float64."""

    x: Tensor  # [T, I]
    packed: Tensor
    scale: Tensor
    zero: Tensor | None
    bits: int
    group: int
    weight: Tensor  # [O, I] float64

    def arguments(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None, int, int]:
        return self[:6]


def packed_problem(
    rows: int, columns: int, bits: int, group: int, tokens: int, *, symmetric: bool = False,
    dtype: torch.dtype = torch.bfloat16, scale: torch.dtype = torch.float16, seed: int = 0,
) -> Packed:  # fmt: skip
    g = torch.Generator().manual_seed(seed)
    groups = -(-columns // group)
    codes = torch.randint(0, 1 << bits, (rows, columns), generator=g, dtype=torch.uint8)
    scales = ((torch.rand(rows, groups, generator=g) + 0.1) * 0.1).to(scale)
    points = torch.randint(0, 1 << bits, (rows, groups), generator=g, dtype=torch.uint8)
    stream = pack_rows(points.view(1, -1), bits)[0, : -(-points.numel() * bits // 8)].clone()
    index = torch.arange(columns) // group
    middle = points.double()[:, index] if not symmetric else float(1 << bits - 1)
    weight = scales.double()[:, index] * (codes.double() - middle)
    x = torch.randn(tokens, columns, generator=g).to(dtype)
    moved = (t.to(DEVICE) for t in (x, pack_rows(codes, bits), scales, stream, weight))
    x, packed, scales, stream, weight = moved
    return Packed(x, packed, scales, None if symmetric else stream, bits, group, weight)


def check(problem: Packed, found: Tensor, *, weights_rounded: bool) -> None:
    """Every output within what its roundings explain: of the weights to x's type where tensor cores take them, of the output to x's type, and of
    float32 sums (of codes without their zero points: up to 2^(bits + 1) steps each)."""
    x = problem.x.double()
    true = x @ problem.weight.T
    step = problem.scale.double().abs().amax() * 2.0 ** (problem.bits + 1)
    limit = 2.0**-20 * step * x.abs().sum(1, keepdim=True)
    unit = {torch.bfloat16: UNIT, torch.float16: 2.0**-11, torch.float32: 2.0**-24}[problem.x.dtype]
    limit = limit + unit * true.abs()
    if weights_rounded:
        limit = limit + unit * (x.abs() @ problem.weight.abs().T)
    assert found.shape == true.shape and found.dtype == problem.x.dtype
    assert bool(((found.double() - true).abs() <= limit).all()), float(((found.double() - true).abs() / limit).max())
