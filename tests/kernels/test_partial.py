"""Matrices of two levels and a few wider codes: decoding, lists of places, and the mixed grid of the column loop, on every path."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dither.kernels import (
    AffineGrid,
    MixedGrid,
    PartialMatrix,
    dequantize_partial,
    gptq_columns,
    pack_rows,
    places_to_bitmap,
)
from dither.kernels.gptq import gptq_errors
from kernels.problems import affine_grid, factor, hessian, unaligned


def draw(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# -- decoding ------------------------------------------------------------------------------------------------------------------


class Stored:
    """A random matrix in its stored form, and what it means, written out."""

    def __init__(self, rows: int, columns: int, share: float, bits: int, group: int, seed: int = 0) -> None:
        g = draw(seed)
        self.binary = torch.rand(rows, columns, generator=g) >= share
        codes = torch.where(self.binary, torch.randint(0, 2, (rows, columns), generator=g), torch.randint(0, 2**bits, (rows, columns), generator=g))
        groups = -(-columns // group)
        self.low, self.high = torch.randn(rows, groups, generator=g), torch.randn(rows, groups, generator=g)
        self.scale, self.zero = torch.rand(rows, generator=g) + 0.01, torch.randint(0, 2**bits, (rows,), generator=g).float()
        self.bits, self.group, self.columns = bits, group, columns
        top = torch.where(self.binary, codes, codes >> (bits - 1)).to(torch.uint8)
        rest = (codes[~self.binary] & 2 ** (bits - 1) - 1).to(torch.uint8)
        self.plane, self.mask = pack_rows(top, 1), pack_rows(self.binary.to(torch.uint8), 1)
        self.codes = pack_rows(rest[None], bits - 1)[0, : -(-len(rest) * (bits - 1) // 8)].contiguous()
        own = (~self.binary).sum(1)
        self.offsets = (own.cumsum(0) - own).to(torch.uint32)
        index = torch.arange(columns) // group
        self.values = torch.where(
            self.binary,
            torch.where(codes == 1, self.high[:, index], self.low[:, index]),
            self.scale[:, None] * (codes - self.zero[:, None]),
        )

    def decoded(self, dtype: torch.dtype = torch.float32, **other: Tensor | None) -> Tensor:
        given = {name: getattr(self, name) for name in ("mask", "codes", "offsets")} | other
        return dequantize_partial(
            given["mask"], self.plane, self.low, self.high, given["codes"], self.bits, given["offsets"], self.scale, self.zero,
            self.group, self.columns, dtype,
        )


SHAPES = [(1, 1), (3, 7), (5, 8), (4, 16), (2, 31), (7, 32), (3, 33), (9, 63), (6, 64), (5, 100), (3, 257)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [2, 5, 8])
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_decodes_to_what_it_says(path: str, rows: int, columns: int, bits: int, dtype: torch.dtype) -> None:
    for share, group in ((0.1, columns), (0.5, 5), (0.9, 16)):
        made = Stored(rows, columns, share, bits, group, seed=rows + columns)
        assert torch.equal(made.decoded(dtype), made.values.to(dtype))


def test_all_or_none_salient(path: str) -> None:
    everything = Stored(5, 41, 1.1, 8, 41)
    assert torch.equal(everything.decoded(mask=None, offsets=None), everything.values)
    nothing = Stored(5, 41, 0.0, 8, 7)
    assert torch.equal(nothing.decoded(mask=None, codes=None, offsets=None), nothing.values)


@pytest.mark.parametrize(("rows", "columns"), [(0, 5), (3, 0)])
def test_empty(path: str, rows: int, columns: int) -> None:
    assert Stored(rows, columns, 0.1, 8, 4).decoded().shape == (rows, columns)


def test_streams_may_lie_anywhere_and_threads_do_not_matter(path: str) -> None:
    made = Stored(200, 96, 0.2, 7, 96)
    torch.set_num_threads(3)
    assert torch.equal(made.decoded(mask=unaligned(made.mask), codes=unaligned(made.codes)), made.values)


def test_a_wrong_offset_reads_nothing_beyond_the_stream(on) -> None:  # type: ignore[no-untyped-def]
    for isa in ("scalar", "avx2", "avx512"):
        on(isa)
        made = Stored(9, 70, 0.3, 8, 70)
        wild = torch.full((9,), 2**32 - 1, dtype=torch.int64).to(torch.uint32)
        assert bool(torch.isfinite(made.decoded(offsets=wild)).all())


def test_wrong_arguments() -> None:
    made = Stored(4, 40, 0.2, 8, 8)
    cases: list[tuple[str, dict[str, Tensor | None]]] = [
        ("mask", {"mask": made.mask[:3]}),
        ("codes", {"codes": None}),
        ("codes", {"codes": made.codes.float()}),
        ("offsets", {"offsets": made.offsets.to(torch.int64)}),
    ]
    for name, other in cases:
        with pytest.raises(ValueError, match=f"^{name}: "):
            made.decoded(**other)
    with pytest.raises(ValueError, match=r"^dtype: "):
        made.decoded(torch.float16)
    made.bits = 1
    with pytest.raises(ValueError, match=r"^bits: "):
        made.decoded()


# -- products ------------------------------------------------------------------------------------------------------------------


def product_of(made: Stored, **other: Tensor | None) -> PartialMatrix:
    given = {name: getattr(made, name) for name in ("mask", "plane", "codes", "offsets")} | other
    assert given["plane"] is not None
    return PartialMatrix(
        given["mask"], given["plane"], made.low, made.high, given["codes"], made.bits, given["offsets"], made.scale, made.zero,
        made.group, made.columns,
    )


def assert_product(found: Tensor, values: Tensor, x: Tensor) -> None:
    size = x.double().abs() @ values.double().abs().T
    limit = 2.0**-20 if x.dtype == torch.float32 else 2.0**-8  # sums of at most 576 / 16 in each lane; y rounded to bfloat16
    assert found.dtype == x.dtype and bool(((found.double() - x.double() @ values.double().T).abs() <= limit * size).all())


@pytest.mark.parametrize("bits", [2, 3, 5, 8])
@pytest.mark.parametrize(("rows", "columns"), [*SHAPES, (5, 128), (4, 576), (3, 300)])
def test_products_against_float64(path: str, rows: int, columns: int, bits: int) -> None:
    for share, group in ((0.1, columns), (0.5, 5), (0.9, 16), (0.3, 48), (0.02, 128)):
        made = Stored(rows, columns, share, bits, group, seed=rows + columns)
        x = torch.randn(9, columns, generator=draw(1))
        for given in (x, x[:1], x[:3].bfloat16(), x[:7]):
            assert_product(product_of(made)(given), made.values, given)


@pytest.mark.parametrize("group", [7, 41, 16])
def test_products_of_all_or_none_salient(path: str, group: int) -> None:
    x = torch.randn(3, 100, generator=draw(1))
    everything = Stored(5, 100, 1.1, 8, group)
    assert_product(product_of(everything, mask=None, offsets=None)(x), everything.values, x)
    nothing = Stored(5, 100, 0.0, 8, group)
    assert_product(product_of(nothing, mask=None, codes=None, offsets=None)(x), nothing.values, x)


@pytest.mark.parametrize("group", [576, 20, 32])
def test_rows_of_products_know_nothing_of_each_other(path: str, group: int) -> None:
    made, x = Stored(70, 576, 0.1, 8, group), torch.randn(11, 576, generator=draw(1))
    held = product_of(made, mask=unaligned(made.mask), plane=unaligned(made.plane), codes=unaligned(made.codes))
    every = held(x)
    assert_product(every, made.values, x)
    if path != "reference":  # torch's own products depend on the rows beside
        assert all(torch.equal(held(x[t : t + 1])[0], every[t]) for t in range(11))
        torch.set_num_threads(3)
        assert torch.equal(held(x), every) and torch.equal(held(x[3:9]), every[3:9])


def test_products_keep_nan_and_inf_in_their_rows(path: str) -> None:
    made, x = Stored(4, 130, 0.3, 8, 130), torch.randn(3, 130, generator=draw(1))
    x[1, 128], x[2, 5] = float("nan"), float("inf")
    found = product_of(made)(x)
    assert bool(found[0].isfinite().all()) and bool(found[1].isnan().all()) and bool((found[2] == made.values[:, 5].sign() * torch.inf).all())


@pytest.mark.parametrize("isa", ["scalar", "avx2", "avx512"])
def test_a_stream_that_ends_early_reads_as_zero(isa: str, on: Callable[[str], None]) -> None:
    on(isa)  # the reference needs no offsets, and whole streams
    made, x = Stored(6, 96, 0.5, 8, 96), torch.randn(2, 96, generator=draw(1))
    short = made.codes[: len(made.codes) // 2].clone()
    late = made.offsets.to(torch.int64).add(10**6).to(torch.uint32)
    for other in ({"codes": short}, {"offsets": late}):
        assert_product(product_of(made, **other)(x), made.decoded(**other), x)


def test_products_that_are_refused() -> None:
    made = Stored(6, 96, 0.5, 8, 96)
    with pytest.raises(ValueError, match="x"):
        product_of(made)(torch.randn(2, 95))
    with pytest.raises(ValueError, match="no gradient"):
        product_of(made)(torch.randn(2, 96, requires_grad=True))
    with pytest.raises(ValueError, match="codes: a mask needs"):
        product_of(made, codes=None)
    with pytest.raises(ValueError, match="plane"):
        product_of(made, plane=made.plane[:, :4].contiguous())


# -- lists of places --------------------------------------------------------------------------------------------------------------


def listed(places: list[int], low_bits: int) -> tuple[Tensor, Tensor]:
    """Elias-Fano, place by place: a stream of low parts, and a set bit at ``(place >> low_bits) + k`` for place k."""
    low = [(p >> b) & 1 for p in places for b in range(low_bits)]
    high = [0] * ((places[-1] >> low_bits) + len(places) if places else 0)
    for k, p in enumerate(places):
        high[(p >> low_bits) + k] = 1

    def as_bytes(bits: list[int]) -> Tensor:
        return torch.tensor([sum(b << i for i, b in enumerate(bits[j : j + 8])) for j in range(0, len(bits), 8)], dtype=torch.uint8)

    return as_bytes(low), as_bytes(high)


@pytest.mark.parametrize("low_bits", [0, 1, 3, 5, 8])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 5), (4, 32), (7, 33), (20, 50)])
def test_places_become_bits(path: str, rows: int, columns: int, low_bits: int) -> None:
    for share in (0.02, 0.3, 1.0):
        chosen = torch.rand(rows, columns, generator=draw(rows)) < share
        places = chosen.reshape(-1).nonzero()[:, 0].tolist()
        low, high = listed(places, low_bits)
        for kind in (True, False):
            bitmap = places_to_bitmap(low, low_bits, high, len(places), rows, columns, listed=kind)
            assert torch.equal(bitmap, pack_rows((chosen == kind).to(torch.uint8), 1))


def test_damaged_lists_stay_inside(path: str) -> None:
    low, high = listed([0, 3, 900], 3)
    bitmap = places_to_bitmap(low, 3, high, 3, 2, 9, listed=True)  # 900 is beyond 18
    assert bitmap[:, :1].tolist() == [[0b1001], [0]]
    noise = torch.randint(0, 256, (40,), generator=draw(), dtype=torch.uint8)
    assert places_to_bitmap(noise[:12], 8, noise, 12, 5, 33, listed=False).shape == (5, 8)


def test_wrong_lists() -> None:
    low, high = listed([1, 5], 2)
    with pytest.raises(ValueError, match=r"^low: "):
        places_to_bitmap(low, 2, high, 9, 2, 4, listed=True)
    with pytest.raises(ValueError, match=r"^low_bits: "):
        places_to_bitmap(low, 9, high, 2, 2, 4, listed=True)


# -- the mixed grid of the column loop --------------------------------------------------------------------------------------------


def mixed(rows: int, columns: int, groups: int, share: float, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, MixedGrid]:
    """Weights, factor, the group of each column, and a grid that is binary but for ``share`` of the weights."""
    g = draw(seed)
    weight = torch.randn(rows, columns, generator=g, dtype=torch.float64)
    affine, group = affine_grid(weight, groups, 8)
    alpha, mu = torch.rand(rows, groups, generator=g).double(), torch.randn(rows, groups, generator=g).double() / 10
    binary = torch.rand(rows, columns, generator=g) >= share
    order = torch.randperm(columns, generator=g)
    return weight, factor(hessian(columns, seed)), group[order].contiguous(), MixedGrid(affine.scale, affine.zero, 255, alpha, mu, binary)


@pytest.mark.parametrize(
    ("rows", "columns", "groups"), [(1, 1, 1), (1, 13, 1), (7, 11, 3), (16, 12, 1), (17, 25, 5), (33, 49, 1), (70, 130, 4)]
)
def test_mixed_columns_match_a_plain_loop(path: str, rows: int, columns: int, groups: int) -> None:
    weight, u, group, grid = mixed(rows, columns, groups, 0.3)
    work, codes, errors = weight.clone(), torch.zeros(rows, columns, dtype=torch.uint8), torch.zeros_like(weight)
    for c in range(columns):
        g, w = int(group[c]), work[:, c].clone()
        up = w >= grid.mu[:, g]
        fine = torch.clamp(torch.round(w / grid.scale[:, g]) + grid.zero[:, g], 0, 255)
        two = torch.where(up, grid.mu[:, g] + grid.alpha[:, g], grid.mu[:, g] - grid.alpha[:, g])
        codes[:, c] = torch.where(grid.binary[:, c], up, fine).to(torch.uint8)
        errors[:, c] = (w - torch.where(grid.binary[:, c], two, grid.scale[:, g] * (fine - grid.zero[:, g]))) / u[c, c]
        work[:, c + 1 :] -= errors[:, c : c + 1] * u[c, c + 1 :]
    found, loss, found_errors = gptq_errors(unaligned(weight), unaligned(u), group, grid)
    assert torch.equal(found, codes)
    torch.testing.assert_close(found_errors, errors, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(loss, errors.square().sum(1) / 2, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nothing_binary_is_the_affine_grid_to_the_bit(path: str, dtype: torch.dtype) -> None:
    weight, u, group, grid = mixed(40, 100, 3, 1.1)
    assert not bool(grid.binary.any())
    mine = gptq_errors(weight.to(dtype), u.to(dtype), group, grid)
    plain = gptq_errors(weight.to(dtype), u.to(dtype), group, AffineGrid(grid.scale, grid.zero, 255))
    assert all(torch.equal(a, b) for a, b in zip(mine, plain, strict=True))


def test_mixed_loss_is_the_damped_quadratic(path: str) -> None:
    weight, u, group, grid = mixed(20, 90, 2, 0.2, seed=1)
    codes, loss = gptq_columns(weight, u, group, grid)
    d = weight - grid.decode(codes, group)
    torch.testing.assert_close(((d @ hessian(90, 1)) * d).sum(1), 2 * loss, rtol=1e-9, atol=0)


def test_zero_belongs_to_the_upper_level(path: str) -> None:
    one = torch.ones(1, 1)
    grid = MixedGrid(one, 0 * one, 255, 2 * one, 0.5 * one, torch.tensor([[True, True, True]]))
    w = torch.tensor([[0.5, 0.49, 0.51]])
    codes, _ = gptq_columns(w, torch.eye(3), torch.zeros(3, dtype=torch.int64), grid)
    assert codes.tolist() == [[1, 0, 1]]
    assert grid.decode(codes, torch.zeros(3, dtype=torch.int64)).tolist() == [[2.5, -1.5, 2.5]]


def test_wrong_mixed_grids() -> None:
    weight, u, group, grid = mixed(4, 6, 1, 0.3)
    for name, wrong in (
        ("binary", {"binary": grid.binary[:, :5]}),
        ("binary", {"binary": grid.binary.to(torch.uint8)}),
        ("alpha", {"alpha": grid.alpha / 0}),
        ("mu", {"mu": grid.mu[:3]}),
        ("code_max", {"code_max": 256}),
    ):
        values = {f: getattr(grid, f) for f in ("scale", "zero", "code_max", "alpha", "mu", "binary")} | wrong
        with pytest.raises(ValueError, match=f"^{name}: "):
            gptq_columns(weight, u, group, MixedGrid(**values))
