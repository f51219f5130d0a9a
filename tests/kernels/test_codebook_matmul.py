"""Products with weights stored as indices of vectors against float64, on every path, for all widths of indices and vectors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dither.kernels import CodebookMatrix, decode_codebook, pack_wide
from kernels.problems import unaligned


def parts(
    rows: int, columns: int, v: int, main: int, other: int = 0, groups: int = 1, some: int | None = None, affine: bool = False
) -> dict[str, Any]:
    """A random matrix: ``main`` and ``other`` bits of an index, ``some`` of the columns in any order."""
    g = torch.Generator().manual_seed(rows + columns + v)
    count = columns if some is None else some
    codes = torch.randint(0, 1 << main + other, (-(-rows // v), count), generator=g, dtype=torch.int32)
    return {
        "packed": pack_wide(codes, main + other), "bits": main + other, "rows": rows, "count": count,
        "centroids": torch.randn(groups, 1 << main, v, generator=g),
        "residuals": torch.randn(groups, 1 << other, v, generator=g) if other else None,
        "group": torch.randint(0, groups, (count,), generator=g, dtype=torch.uint8) if groups > 1 else None,
        "place": None if some is None else torch.randperm(columns, generator=g)[:some].to(torch.int32),
        "affine": (torch.randn(columns, generator=g), torch.randn(columns, generator=g)) if affine else None,
    }  # fmt: skip


def decoded(given_: dict[str, Any], columns: int) -> Tensor:
    """The weights in float64, from the books: an entry is not rounded to float32 after it is scaled."""
    books = {name: given_[name] for name in ("packed", "bits", "centroids", "residuals", "rows", "count", "group")}
    own = decode_codebook(**books, out=torch.empty(given_["rows"], given_["count"])).double()
    at = torch.arange(columns) if given_["place"] is None else given_["place"].long()
    if given_["affine"] is not None:
        own = own * given_["affine"][0].double()[at] + given_["affine"][1].double()[at]
    out = torch.zeros(given_["rows"], columns, dtype=torch.float64)
    out[:, at] = own
    return out


def size_of(given_: dict[str, Any], columns: int, x: Tensor) -> Tensor:
    """The sums of the absolute values of what is added up: entries and biases are, apart."""
    entries = decoded(given_ | {"affine": None}, columns).abs()
    if given_["affine"] is None:
        return x.double().abs() @ entries.T
    scale, bias = (p.double().abs() for p in given_["affine"])
    return (x.double().abs() * scale) @ entries.T + (x.double().abs() @ bias)[:, None]


def assert_product(found: Tensor, given_: dict[str, Any], columns: int, x: Tensor) -> None:
    expected, size = x.double() @ decoded(given_, columns).T, size_of(given_, columns, x)
    limit = 2.0**-18 if x.dtype == torch.float32 else 2.0**-8  # sums of 256 columns and less in each lane; y rounded to bfloat16
    assert found.dtype == x.dtype and found.shape == expected.shape
    assert bool(((found.double() - expected).abs() <= limit * size + 1e-30).all())


def rows_of_x(columns: int, tokens: int = 9) -> Tensor:
    return torch.randn(tokens, columns, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("v", [1, 2, 4, 6, 8, 12, 16, 40])
@pytest.mark.parametrize(("main", "other"), [(1, 0), (4, 0), (8, 0), (11, 0), (8, 4), (8, 8), (7, 5), (9, 9), (2, 1)])
def test_against_float64(path: str, v: int, main: int, other: int) -> None:
    for rows, columns in ((v, 40), (3 * v + 1, 257), (6 * v - (v > 1), 33)):
        made = parts(rows, columns, v, main, other)
        held, x = CodebookMatrix(**made, columns=columns), rows_of_x(columns)
        for given_ in (x, x[:1], x[:3].bfloat16(), x[:6]):
            assert_product(held(given_), made, columns, given_)


@pytest.mark.parametrize("v", [3, 8, 20])
@pytest.mark.parametrize("other", [0, 5])
def test_groups_places_and_scales(path: str, v: int, other: int) -> None:
    x = rows_of_x(300)
    for groups, some, affine in ((3, None, False), (1, 77, False), (1, None, True), (5, 290, True)):
        made = parts(5 * v, 300, v, 6, other, groups, some, affine)
        assert_product(CodebookMatrix(**made, columns=300)(x), made, 300, x)


def test_columns_with_a_book_of_their_own(path: str) -> None:
    first, second = parts(24, 300, 4, 8, some=280), parts(24, 300, 3, 10, some=20)
    every = torch.randperm(300, generator=torch.Generator().manual_seed(0)).to(torch.int32)
    first["place"], second["place"] = every[:280].contiguous(), every[280:].contiguous()
    x = rows_of_x(300)
    for given_ in (x, x.bfloat16()):
        found = CodebookMatrix(**first, columns=300, beside=CodebookMatrix(**second, columns=300))(given_)
        expected = given_.double() @ (decoded(first, 300) + decoded(second, 300)).T
        size = size_of(first, 300, given_) + size_of(second, 300, given_)
        assert bool(((found.double() - expected).abs() <= (2.0**-18 if given_.dtype == torch.float32 else 2.0**-8) * size).all())


@given(
    rows=st.integers(1, 50), columns=st.integers(1, 600), v=st.integers(1, 20), main=st.integers(1, 12), other=st.integers(0, 12),
    tokens=st.integers(1, 10),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_any_shape(rows: int, columns: int, v: int, main: int, other: int, tokens: int) -> None:
    made, x = parts(rows, columns, v, main, other), rows_of_x(columns, tokens)
    assert_product(CodebookMatrix(**made, columns=columns)(x), made, columns, x)


@pytest.mark.parametrize("v", [4, 8, 16])
@pytest.mark.parametrize("other", [0, 4])
def test_rows_know_nothing_of_each_other(path: str, v: int, other: int) -> None:
    made, x = parts(19 * v - 1, 576, v, 8, other, affine=True), rows_of_x(576, 13)
    made["packed"] = unaligned(made["packed"])
    held = CodebookMatrix(**made, columns=576)
    every = held(x)
    if path != "reference":  # torch's own products depend on the rows beside
        assert all(torch.equal(held(x[t : t + 1])[0], every[t]) for t in range(13))
        assert all(torch.equal(held(x[2 : 2 + t]), every[2 : 2 + t]) for t in range(2, 9))
        torch.set_num_threads(3)
        assert torch.equal(held(x), every)


def test_nan_stays_in_its_row(path: str) -> None:
    held, x = CodebookMatrix(**parts(12, 300, 4, 8), columns=300), rows_of_x(300, 3)
    x[1, 299] = float("nan")
    found = held(x)
    assert bool(found[::2].isfinite().all()) and bool(found[1].isnan().all())


@pytest.mark.parametrize(("rows", "columns"), [(0, 5), (8, 0)])
def test_empty(path: str, rows: int, columns: int) -> None:
    made = parts(rows, columns, 4, 8)
    assert torch.equal(CodebookMatrix(**made, columns=columns)(torch.ones(2, columns)), torch.zeros(2, rows))


def test_what_is_refused() -> None:
    made = parts(12, 40, 4, 8)
    held = CodebookMatrix(**made, columns=40)
    for x, message in ((torch.ones(2, 39), "x"), (torch.ones(2, 40).double(), "x"), (torch.ones(2, 80)[:, ::2], "x"), (torch.ones(40), "x")):
        with pytest.raises(ValueError, match=message):
            held(x)
    with pytest.raises(ValueError, match="no gradient"):
        held(torch.ones(2, 40, requires_grad=True))
    wide = parts(12, 40, 4, 8, some=30)
    for wrong, message in (
        ({"bits": 7}, "bits"),
        ({"packed": made["packed"][:2]}, "packed"),
        ({"count": 39}, "count"),
        (wide | {"place": wide["place"] + 20}, "place"),
        ({"affine": (torch.ones(40), torch.ones(39))}, "bias"),
        ({"beside": CodebookMatrix(**parts(8, 40, 4, 8), columns=40)}, "beside"),
    ):
        with pytest.raises(ValueError, match=message):
            CodebookMatrix(**(made | wrong), columns=40)
