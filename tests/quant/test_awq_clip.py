"""AWQ's clipping search against one written from section 3 of its spec with plain loops, and the exponents that the screening keeps."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dither import graph
from dither.formats import Int, Scheme, group
from dither.quant.grids import OutputClip
from dither.quant.parts import BlockView
from dither.quant.statistics import MEAN_ABS, ROWS, Statistics
from dither.quant.transforms import scale as transforms
from dither.quant.transforms.scale import ScaleSearch
from dither.quant.walker import Call

INPUTS, OUTPUTS, GROUP = 24, 10, 8


def problem(seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight whose groups are skewed and have outliers, and correlated inputs."""
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(OUTPUTS, INPUTS, generator=g) + 0.4
    weight = torch.where(torch.rand(weight.shape, generator=g) < 0.1, 4 * weight, weight)
    return weight, torch.randn(200, INPUTS, generator=g) @ torch.randn(INPUTS, INPUTS, generator=g)


def clipped_by_loops(weight: Tensor, x: Tensor, scheme: Scheme) -> Tensor:
    """c = max |w| (1 - i / 20), i = 0 .. 9; the first c with the least mean_t ((Q(clamp(w)) - w) . x_t)^2 of a row and group; then Q."""
    w, found = weight.double(), torch.empty(weight.shape, dtype=torch.float64)
    for o in range(OUTPUTS):
        for k in range(0, INPUTS, GROUP):
            own, rows = w[o : o + 1, k : k + GROUP], x[:, k : k + GROUP].double()
            best, least = own, math.inf
            for i in range(10):
                c = float(own.abs().max()) * (1 - i / 20)
                rounded = scheme.quantize(own.clamp(-c, c).float().contiguous()).double()
                error = float(((rounded - own) @ rows.T).square().mean())
                if error < least * (1 - 1e-6):
                    best, least = rounded, error
            found[o, k : k + GROUP] = best
    return found


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_absolute_clipping_is_the_paper_s(bits: int, seed: int) -> None:
    """On grids whose ends are those of the range; where the zero point is a code, the grid may reach beyond c and take more of the weights."""
    weight, x = problem(seed)
    scheme = Int(bits, zero="float", scale="float32") @ group(GROUP)
    statistics = Statistics(INPUTS, frozenset({ROWS}))
    statistics.update(x)
    params = OutputClip(mode="absolute").fit(weight, scheme, statistics)
    ours, theirs = scheme.quantize(weight, params).double(), clipped_by_loops(weight, x, scheme)

    def errors(decoded: Tensor) -> Tensor:  # of each row and group
        d = (decoded - weight.double()).view(OUTPUTS, -1, GROUP)
        return torch.einsum("okj,tkj->tok", d, x.double().view(len(x), -1, GROUP)).square().mean(0)

    assert torch.allclose(errors(ours), errors(theirs), rtol=1e-3)


def two_layers(calls: int) -> tuple[BlockView, Any, Any]:
    g = torch.Generator().manual_seed(0)
    block = nn.Sequential(nn.Linear(INPUTS, INPUTS, bias=False), nn.Linear(INPUTS, OUTPUTS, bias=False))
    with torch.no_grad():
        block[0].weight.copy_(torch.eye(INPUTS))
        block[1].weight.copy_(torch.randn(OUTPUTS, INPUTS, generator=g))
    batches = [torch.randn(64, INPUTS, generator=g) * torch.linspace(0.1, 10, INPUTS) for _ in range(calls)]
    seen = Statistics(INPUTS, frozenset({MEAN_ABS, ROWS}))
    seen.update(torch.cat(batches))
    structure = graph.discover_block(block, [((torch.randn(8, INPUTS),), {})])
    scheme = Int(3) @ group(GROUP)
    view = BlockView(0, "block", block, structure, {"1": seen}, {"1": scheme}, torch.float32, {"1": [Call((x,), {}) for x in batches]})
    (site,) = [s for s in structure.sites if s.kind == "scale"]
    return view, site, list(site.consumers)


def test_screening_judges_few_exponents_on_all_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int | None, int]] = []
    loss = transforms._Trial.loss

    def counted(self: Any, scale: Tensor, calls: int | None = None) -> float:
        found = loss(self, scale, calls)
        seen.append((calls, len(self.calls)))
        return found

    monkeypatch.setattr(transforms._Trial, "loss", counted)
    view, site, readers = two_layers(4)
    full, found = ScaleSearch(screen=256).search(view, site, readers)
    assert seen == [(None, 4)] * 20
    seen.clear()
    screened, again = ScaleSearch(screen=64).search(view, site, readers)
    assert seen[:20] == [(1, 4)] * 20 and [calls for calls, _ in seen[20:]] == [None] * 4
    assert torch.equal(full, screened) and again == found  # and they come to the same


def test_no_finite_loss_names_the_site(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transforms._Trial, "loss", lambda self, scale, calls=None: math.nan)
    for screen in (64, 1024):
        with pytest.raises(FloatingPointError, match=r"block: no exponent gives a finite loss at the site .*0"):
            ScaleSearch(screen=screen).search(*two_layers(2))
