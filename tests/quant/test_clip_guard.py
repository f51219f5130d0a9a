"""AWQ's guard: clipping that was searched on half of the inputs is kept only where it also helps the other half."""

from __future__ import annotations

import torch

from dither.formats import Int, Scheme, group
from dither.quant.grids import OutputClip
from dither.quant.statistics import ROWS, Statistics

SCHEME: Scheme = Int(2) @ group(16)


def error(weight: torch.Tensor, rows: torch.Tensor, params: dict[str, torch.Tensor]) -> float:
    return float((rows @ (SCHEME.quantize(weight, params) - weight).T).square().sum())


def statistics(rows: torch.Tensor) -> Statistics:
    found = Statistics(rows.shape[1], frozenset({ROWS}), max_rows=len(rows))
    found.update(rows)
    return found


def test_the_guard_keeps_the_better_of_both_on_unseen_inputs() -> None:
    g = torch.Generator().manual_seed(0)
    outcomes = set()
    for case in range(12):
        weight = torch.randn(8, 32, generator=g)
        rows = torch.randn(64, 32, generator=g)
        if case % 2:  # inputs of the second half weigh just the weights that the first half lets clipping cut off
            hot = weight.abs().sum(0).topk(4).indices
            rows[::2, hot], rows[1::2, hot] = 0.0, 100 * rows[1::2, hot]
        full = SCHEME.fit(weight)
        kept = OutputClip(guard=True).fit(weight, SCHEME, statistics(rows))
        searched = OutputClip().fit(weight, SCHEME, statistics(rows[::2]))
        unseen = rows[1::2]
        best = min(error(weight, unseen, full), error(weight, unseen, searched))
        assert abs(error(weight, unseen, kept) - best) <= 1e-5 * best
        outcomes.add(torch.equal(kept["scale"], full["scale"]))
    assert outcomes == {True, False}  # both verdicts were seen
