"""Static grids for the operands of attention: Q and K of Q K^T, V and the probabilities A of A V. Per tensor.

Q, K, V are asymmetric integers (as `static_inputs`). A lies in [0, 1] and is mostly near 0, where even steps see nothing; it is rounded to powers
of 2 or sqrt 2 (`formats.logarithm`; arXiv 2212.08254, section 3.3) or, as a baseline, to even steps:

    A_hat = s 2^(-q / 2),  q = round(-2 log2(A / s))         s from the quantiles of A with the least squared error

Each attention module is found by running the block: what goes through transformers' attention function is seen. At most 2^20 values of an operand are
looked at, whole rows drawn under the run's seed. Cost: one more pass of the block over the calibration data.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from dither import models
from dither.formats import Int, Log
from dither.formats.format import Format
from dither.formats.quantiles import free_affine
from dither.quant.attention_inputs import OPERANDS, watched
from dither.quant.inputs import InputQuant, round_rows
from dither.quant.parts import BlockView, Transform
from dither.quant.transforms.static_inputs import static
from dither.quant.walker import run

SOFTMAX = ("log_sqrt2", "log2", "uniform")
MOST = 1 << 20  # values of an operand that its grid is fitted on


@dataclass(frozen=True)
class AttentionOperands(Transform):
    """``bits`` of every operand; ``softmax``: how probabilities are rounded, "log_sqrt2", "log2", "uniform", or None for not at all; ``search``:
    "quantile" or "minmax"."""

    bits: int = 4
    softmax: str | None = "log_sqrt2"
    search: str = "quantile"
    uses_sites: ClassVar[bool] = False
    uses_calls: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.softmax is not None and self.softmax not in SOFTMAX:
            raise ValueError(f"softmax must be one of {', '.join(SOFTMAX)} or None, not {self.softmax!r}")

    def captures(self, block: BlockView) -> Collection[str]:
        return ()

    def apply(self, block: BlockView) -> None:
        runner = copy.deepcopy(block.module).to(block.compute)
        names = {id(m): n for n, m in runner.named_modules()}
        generator = torch.Generator().manual_seed(block.seed)
        share = MOST // max(len(block.float_calls), 1)
        seen: dict[str, dict[str, list[Tensor]]] = {}

        def watch(module: nn.Module, operands: Mapping[str, Tensor]) -> None:
            kept = seen.setdefault(names[id(module)], {operand: [] for operand in OPERANDS})
            for operand, x in operands.items():
                kept[operand].append(_sample(x, share, generator))

        with watched(runner, watch):
            run(runner, block.float_calls)
        models.empty(runner)
        for name, kept in seen.items():
            block.attention[name] = {}
            for operand, rows in kept.items():
                fmt = self._format(operand)
                if fmt is not None:
                    values = torch.cat([r.reshape(-1) for r in rows])
                    make = free_affine(self.bits) if isinstance(fmt, Int) else None
                    block.attention[name][operand] = static(values, fmt, self.search, make)
            block.findings.append(_finding(block, name, kept["probabilities"]))
        if not seen:
            block.notes.append(f"{block.name}: no attention goes through transformers' attention function, so any such products stay float")

    def _format(self, operand: str) -> Format | None:
        if operand != "probabilities" or self.softmax == "uniform":
            return Int(self.bits, scale="float32")
        return None if self.softmax is None else Log(self.bits, root=2 if self.softmax == "log_sqrt2" else 1)


def _finding(block: BlockView, name: str, rows: list[Tensor]) -> dict[str, object]:
    """What rounding does to the probabilities: the mean of their sums, which nothing brings back to 1, and the share that became 0."""
    quant: InputQuant | None = block.attention[name].get("probabilities")
    rounded = rows if quant is None else [round_rows(r, quant.scheme, quant.params) for r in rows]
    count = sum(len(r) for r in rows)
    values = sum(r.numel() for r in rows)
    return {
        "site": f"{block.name}: {name}: probabilities" if name else f"{block.name}: probabilities",
        "row_sum": float(sum(float(r.sum()) for r in rounded)) / max(count, 1),
        "zeros": sum(int((r == 0).sum()) for r in rounded) / max(values, 1),
        "rows": count,
    }


def _sample(x: Tensor, most: int, generator: torch.Generator) -> Tensor:
    """``x [..., n]`` -> float32 rows ``[R, n]`` with about ``most`` values: all, or as many as fit, drawn."""
    rows = x.detach().reshape(-1, x.shape[-1])
    keep = max(most // x.shape[-1], 1)
    if len(rows) > keep:
        rows = rows[torch.randperm(len(rows), generator=generator)[:keep].sort().values]
    return rows.float()
