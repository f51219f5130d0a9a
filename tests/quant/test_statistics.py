"""Statistics of a layer's input against their definitions in float64, whatever batches the tokens come in; and what a convolution multiplies."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dither.quant.statistics import HESSIAN, MAX_ABS, MEAN, MEAN_ABS, ROWS, Statistics, layer_input

ALL = frozenset({HESSIAN, MEAN, MEAN_ABS, MAX_ABS, ROWS})
SPLITS = [[500], [1, 499], [0, 3, 128, 0, 369], [50] * 10]
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)


def tokens(count: int = 500, features: int = 24, dtype: torch.dtype = torch.float32) -> Tensor:
    """Correlated, of many sizes, not centred."""
    draw = torch.Generator().manual_seed(0)
    mix = torch.randn(features, features, generator=draw) * torch.logspace(-2, 1, features)
    return (torch.randn(count, features, generator=draw) @ mix + torch.linspace(-1, 1, features)).to(dtype)


def seen(*batches: Tensor, needs: frozenset[str] = ALL, max_rows: int = 2048) -> Statistics:
    found = Statistics(batches[0].shape[-1], needs, max_rows)
    for batch in batches:
        found.update(batch)
    return found


def close(a: Tensor, b: Tensor, rel: float = 1e-5) -> bool:
    return float((a.double() - b.double()).abs().max()) <= rel * float(b.abs().max())


def same(found: Statistics, x: Tensor, magnitudes: bool = True) -> bool:
    """Whether all that ``found`` holds is what the rows ``x [T, I]`` give (all rows kept)."""
    x = x.double()
    h = x.T @ x / len(x)
    good = [close(found.hessian, h), close(found.hessian, found.hessian.T, 1e-15), close(found.rows, x), close(found.power(), h.diagonal())]
    if magnitudes:
        good += [close(found.mean_abs, x.abs().mean(0)), close(found.max_abs, x.abs().amax(0), 1e-6)]
    return all(good)


@DTYPES
@pytest.mark.parametrize("split", SPLITS, ids=str)
def test_definitions(split: list[int], dtype: torch.dtype) -> None:
    x = tokens(dtype=dtype)
    found = seen(*x.split(split))
    assert found.tokens == 500 and same(found, x) and torch.equal(found.hessian, found.hessian.T)
    assert found.hessian.dtype == torch.float64 and {found.mean_abs.dtype, found.max_abs.dtype, found.rows.dtype} == {torch.float32}


def test_a_large_hessian_is_that_of_float64() -> None:
    """Several tiles of the kernel, more features than tokens."""
    x = tokens(70, 260)
    assert close(seen(x[:33], x[33:], needs=frozenset({HESSIAN})).hessian, x.double().T @ x.double() / 70, 1e-6)


@pytest.mark.parametrize("split", SPLITS, ids=str)
@pytest.mark.parametrize("most", [1, 7, 64, 250, 499, 500])
def test_the_sample_is_every_so_many_rows_of_the_stream(split: list[int], most: int) -> None:
    """The stride is the least power of two that leaves at most so many rows; how the stream is cut does not show."""
    x = tokens()
    stride = next(2**k for k in range(10) if -(-500 // 2**k) <= most)
    assert torch.equal(seen(*x.split(split), needs=frozenset({ROWS}), max_rows=most).rows, x[::stride])


def test_leading_dimensions_are_tokens() -> None:
    x = tokens(48)
    assert same(seen(x.view(4, 12, 24)), x)


def test_scales_and_shifts_are_those_of_the_scaled_and_shifted_inputs() -> None:
    x, s, d = tokens(), torch.linspace(0.1, 5, 24), torch.linspace(3, -2, 24)
    found = seen(x)
    found.rescale(s)
    assert same(found, x.double() / s)
    found.rescale(1 / s)
    assert same(found, x)
    found.shift(d)
    assert same(found, x.double() - d, magnitudes=False)
    with pytest.raises(KeyError, match=r"mean \|x\|"):
        found.mean_abs  # noqa: B018  # does not follow from that of x
    found.rescale(s)
    found.shift(-d)  # the mean has moved along
    assert same(found, (x.double() - d) / s + d, magnitudes=False)


@pytest.mark.parametrize("needs", [ROWS, HESSIAN])
@pytest.mark.parametrize("size", [24, 8, 5, 1, 30])
def test_blocks_of_the_gram_matrix(needs: str, size: int) -> None:
    x = tokens(dtype=torch.float64)
    blocks = [b for stack in seen(x, needs=frozenset({needs})).gram_blocks(size) for b in stack]
    wanted = [part.T @ part / 500 for part in x.split(size, 1)]
    assert len(blocks) == len(wanted) and all(close(b, w) for b, w in zip(blocks, wanted, strict=True))


def test_what_is_derived_is_made_once_for_the_same_rows() -> None:
    x, made = tokens(), []
    found = seen(x, needs=frozenset({MEAN_ABS}))

    def derive() -> int:
        return found.derived("key", lambda: made.append(0) or len(made))  # type: ignore[func-returns-value]

    assert [derive(), derive()] == [1, 1]
    for change in (lambda: found.update(x), lambda: found.rescale(torch.ones(24)), lambda: found.shift(torch.ones(24))):
        change()
        assert derive() == derive() == len(made)
    assert len(made) == 4


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("needs", [HESSIAN, MEAN_ABS, MAX_ABS])
@DTYPES
def test_inputs_that_are_not_finite_are_refused(bad: float, needs: str, dtype: torch.dtype) -> None:
    x = tokens(dtype=dtype)
    x[77, 5] = bad
    with pytest.raises(ValueError, match="NaN or inf"):
        seen(x[:50], x[50:], needs=frozenset({needs})).check()


def test_wrong_calls() -> None:
    x, empty = tokens(), Statistics(24, frozenset())
    empty.update(x)
    for name in ("hessian", "mean_abs", "max_abs", "rows"):
        with pytest.raises(KeyError, match="for this layer"):
            getattr(empty, name)
    with pytest.raises(ValueError, match=r"24 features .* \(500, 23\)"):
        empty.update(x[:, :23])
    read = seen(x)
    assert read.hessian is read.hessian
    with pytest.raises(RuntimeError, match="no more rows"):
        read.update(x)
    with pytest.raises(KeyError, match="mean"):
        seen(x, needs=frozenset({HESSIAN})).shift(torch.ones(24))


# -- the rows that a layer multiplies --------------------------------------------------------------------------------


def test_padding_is_left_out() -> None:
    x, layer = tokens(60).view(5, 12, 24), nn.Linear(24, 8)
    mask = torch.arange(12) < torch.tensor([12, 3, 0, 7, 1])[:, None]
    kept = torch.cat([row[m] for row, m in zip(x, mask, strict=True)])
    assert torch.equal(layer_input(layer, x, mask), kept) and same(seen(layer_input(layer, x, mask)), kept)
    assert torch.equal(layer_input(layer, x, None), x.flatten(0, 1))
    assert torch.equal(layer_input(layer, x[:, 0], mask), x[:, 0])  # one vector a sequence: the mask is not about these


LINES = [{}, {"stride": 3}, {"dilation": 2}, {"padding": 4}, {"stride": 2, "dilation": 3, "padding": 1}, {"padding": "valid", "stride": 2}]
LINES += [{"padding": "same"}, {"padding": "same", "dilation": 3}]
PLANES = [{}, {"stride": (2, 3)}, {"dilation": (3, 1)}, {"padding": (0, 2)}, {"stride": (1, 2), "dilation": (2, 1), "padding": (3, 1)}]
PLANES += [{"padding": "same", "dilation": (1, 2)}, {"padding": "valid"}]


@pytest.mark.parametrize("kernel", [1, 3, 5])
@pytest.mark.parametrize("options", LINES, ids=str)
def test_rows_of_a_convolution_over_a_line(kernel: int, options: dict[str, int | str]) -> None:
    layer, x = nn.Conv1d(4, 6, kernel, bias=False, **options), torch.randn(2, 4, 19)  # type: ignore[arg-type]
    rows = layer_input(layer, x, None)
    wanted = F.conv1d(x, layer.weight, **options)  # type: ignore[arg-type]
    assert rows.shape[-1] == 4 * kernel
    torch.testing.assert_close(rows @ layer.weight.flatten(1).T, wanted.transpose(1, 2).flatten(0, 1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kernel", [(1, 1), (3, 3), (5, 3), (1, 7)], ids=str)
@pytest.mark.parametrize("options", PLANES, ids=str)
def test_rows_of_a_convolution_over_a_plane(kernel: tuple[int, int], options: dict[str, tuple[int, int] | str]) -> None:
    layer, x = nn.Conv2d(3, 5, kernel, bias=False, **options), torch.randn(2, 3, 14, 11)  # type: ignore[arg-type]
    rows = layer_input(layer, x, None)
    wanted = F.conv2d(x, layer.weight, **options)  # type: ignore[arg-type]
    torch.testing.assert_close(rows @ layer.weight.flatten(1).T, wanted.flatten(2).transpose(1, 2).flatten(0, 1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("needs", [{ROWS}, {MEAN}, {MEAN, ROWS}])
def test_what_is_not_finite_is_seen_whatever_is_gathered(needs: set[str]) -> None:
    for bad in (math.nan, math.inf, -math.inf):
        x = torch.ones(9, 4)
        x[7, 2] = bad
        with pytest.raises(ValueError, match="NaN or inf"):
            Statistics(4, frozenset(needs), max_rows=2).update(x)


def test_kept_rows_are_copies() -> None:
    x = torch.randn(6, 4)
    statistics, expected = Statistics(4, frozenset({ROWS})), x.clone()
    statistics.update(x)
    x.zero_()
    assert torch.equal(statistics.rows, expected)


@pytest.mark.parametrize("mode", ["zeros", "reflect", "circular", "replicate"])
@pytest.mark.parametrize("kernel", [3, 4])
@pytest.mark.parametrize("padding", ["same", "valid", 1])
@pytest.mark.parametrize("batched", [True, False])
def test_every_padding_of_convolutions(mode: str, kernel: int, padding: Any, batched: bool) -> None:
    for make, shape in ((nn.Conv1d, (2, 3, 11)), (nn.Conv2d, (2, 3, 8, 9))):
        conv, x = make(3, 5, kernel, padding=padding, padding_mode=mode, bias=False), torch.randn(shape)
        x = x if batched else x[0]
        rows = layer_input(conv, x, None)
        expected = conv(x if batched else x[None]).flatten(2).transpose(1, 2).reshape(-1, 5)
        assert torch.allclose(rows @ conv.weight.flatten(1).T, expected, atol=1e-5)
