"""The rule for safe widths, against what torch does: a row's function among others, at every place, in every number."""

from __future__ import annotations

import pytest
import torch

from dither.serve.alignment import Watch


def watched(width: int, dtype: torch.dtype = torch.float32) -> Watch:
    with Watch(7) as watch:
        torch.zeros(7, width, dtype=dtype).exp()
    return watch


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("function", [torch.nn.functional.silu, torch.tanh, torch.exp, torch.cos, torch.nn.functional.gelu])
@pytest.mark.parametrize("width", [1, 2, 3, 4, 8, 16, 24, 32, 48, 64, 96, 100, 576, 4160])
def test_safe_widths_are_safe(width: int, function: object, dtype: torch.dtype) -> None:
    x = torch.randn(8, width, generator=torch.Generator().manual_seed(width)).to(dtype) * 3
    watch = watched(width, dtype)
    for counts in (list(range(1, 9)), [8]):
        if not watch.safe(counts):
            continue
        alone = [function(torch.cat([x[i : i + 1], x.new_zeros(counts[0] - 1, width)]))[0] for i in range(8)]  # type: ignore[operator]
        for count in counts:
            for shift in range(8):
                rows = [(i + shift) % 8 for i in range(count)]
                for i, y in zip(rows, function(x[rows]), strict=True):  # type: ignore[operator]
                    assert torch.equal(y, alone[i])


def test_unsafe_widths_are_known() -> None:
    """The rule is needed: somewhere a row does depend on its place."""
    x = torch.randn(4096, generator=torch.Generator().manual_seed(0)) * 3
    functions = (torch.nn.functional.silu, torch.nn.functional.gelu, torch.tanh, torch.exp, torch.cos)
    assert any(not torch.equal(f(x), torch.cat([f(part) for part in x.split(17)])) for f in functions)
    assert not watched(48).safe(range(1, 9)) and watched(48).safe([8]) and watched(576).safe(range(1, 9)) and not watched(3).safe([8])


def test_stretches_of_threads_count(monkeypatch: pytest.MonkeyPatch) -> None:
    wide = watched(11008)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert wide.safe(range(1, 9))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert not wide.safe(range(1, 9)) and not wide.safe([8])


def test_what_is_watched() -> None:
    x = torch.zeros(7, 48)
    with Watch(7) as watch:
        y = x * 2 + x - x / 3
        y = (y.pow(2).mean(-1, keepdim=True) + 1e-5).rsqrt() * y
        y = torch.where(y > 0, y, x).relu().sqrt()
        y = torch.nn.functional.linear(y, torch.zeros(48, 48))
        torch.zeros(5, 48).exp()  # of no row
    assert not watch.widths
    with Watch(7) as watch:
        torch.nn.functional.silu(x), torch.add(x, x, alpha=0.3), x.double().pow(0.3)
    assert watch.widths == {(48, 4), (48, 8)}
