"""GPTQ (arXiv 2210.17323): second-order rounding keeps language models usable at 3 bits, where round-to-nearest breaks them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from dither.claims.claim import Claim, Figures, Say, Test
from dither.claims.work import CAVEAT, WORK, data, float_perplexity, gap_closed, measured
from dither.formats import Int, Params, Scheme, group
from dither.quant import Grid, Recipe
from dither.quant.recipes import GPTQ
from dither.quant.rounding.nearest import Nearest
from dither.quant.statistics import HESSIAN, Statistics

BITS, GROUP = 3, 64


@dataclass(frozen=True)
class Watched(Grid):
    """Min-max grids that ask for inputs, so that the report has the output error of plain round-to-nearest too."""

    needs: ClassVar[frozenset[str]] = frozenset({HESSIAN})

    def fit(self, weight: Tensor, scheme: Scheme, statistics: Statistics | None) -> Params:
        return scheme.fit(weight)


def measure(seed: int, say: Say) -> Figures:
    figures: Figures = {"float perplexity": float_perplexity()}
    figures |= measured(Recipe((Watched(), Nearest()), Int(BITS) @ group(GROUP), name="rtn"), seed, say, "RTN")
    figures |= measured(
        GPTQ(bits=BITS, group=GROUP, act_order=False, static_groups=False), seed, say, "GPTQ natural order"
    )
    figures |= measured(GPTQ(bits=BITS, group=GROUP), seed, say, "GPTQ act-order")
    figures |= measured(GPTQ(bits=BITS, group=GROUP, clip="output"), seed, say, "GPTQ act-order + clip")
    return figures


CLAIM = Claim(
    name="gptq",
    sentence="Layer-wise Hessian-guided rounding quantizes language models to 3-4 bits with far less loss than round-to-nearest.",
    source="Frantar et al., ICLR 2023, arXiv 2210.17323, tables 2-4; repository IST-DASLab/gptq",
    work=f"{WORK}, at {BITS} bits",
    data=data,
    measure=measure,
    paper={"LLaMA-7B 3-bit RTN": 25.54, "LLaMA-7B 3-bit GPTQ": 8.07, "LLaMA-7B float": 5.68},
    tests=(
        Test(
            "act-order closes at least 25 % of the log-perplexity gap between RTN and float",
            lambda f: gap_closed(f, "GPTQ act-order", "RTN") >= 0.25,
        ),
        Test(
            "act-order is better than natural order",
            lambda f: f["GPTQ act-order perplexity"] < f["GPTQ natural order perplexity"],
        ),
        Test(
            "the layers' output error is at most half of RTN's",
            lambda f: f["GPTQ act-order output error"] <= 0.5 * f["RTN output error"],
        ),
        Test(
            "a clipping search on the grid helps under GPTQ",
            lambda f: f["GPTQ act-order + clip perplexity"] < f["GPTQ act-order perplexity"],
        ),
    ),
    caveat=CAVEAT,
)
