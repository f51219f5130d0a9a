"""GPTQ (arXiv 2210.17323): second-order rounding keeps language models usable at 3 bits, where round-to-nearest breaks them."""

from __future__ import annotations

from dither.claims.claim import Claim, Figures, Say, Test
from dither.claims.work import float_perplexity, gap_closed, measured
from dither.quant.recipes import GPTQ, RTN

BITS, GROUP = 3, 64


def measure(seed: int, say: Say) -> Figures:
    figures: Figures = {"float perplexity": float_perplexity()}
    figures |= measured(RTN(bits=BITS, group=GROUP), seed, say, "RTN")
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
    work="SmolLM2-135M-Instruct, 3 bits in groups of 64, 64 x 512 calibration tokens, perplexity on 4 windows of 2048",
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
            "a clipping search on the grid helps under GPTQ",
            lambda f: f["GPTQ act-order + clip perplexity"] < f["GPTQ act-order perplexity"],
        ),
    ),
    caveat="The float weights are themselves 4-bit (Q4_1, groups of 32), which flatters 4-bit results; 3 bits are not on that grid.",
)
