"""AWQ (arXiv 2306.00978): scales chosen from activations protect the weights that matter, without any back-propagation."""

from __future__ import annotations

import torch

from dither.claims.claim import Claim, Figures, Say, Test
from dither.claims.work import CAVEAT, WORK, data, float_perplexity, gap_closed, measured
from dither.formats import Int, group
from dither.quant.recipes import AWQ, GPTQ, RTN
from dither.quant.transforms.scale import candidate


def synthetic(seed: int) -> Figures:
    """The paper's motivating experiment (its table 1) on Gaussian data: 2048 tokens, 512 inputs, 5 of them 20 times larger; 3 bits, groups of
    128. Output error relative to RTN's: AWQ's scale, and 1 % of the inputs kept float, picked in three ways."""
    g = torch.Generator().manual_seed(seed)
    x, w = torch.randn(2048, 512, generator=g), torch.randn(512, 512, generator=g)
    x[:, torch.randperm(512, generator=g)[:5]] *= 20
    scheme = Int(3) @ group(128)
    rounded = scheme.quantize(w)

    def error(w_hat: torch.Tensor) -> float:
        return float((x @ (w_hat - w).T).square().mean())

    def kept(columns: torch.Tensor) -> float:
        mixed = rounded.clone()
        mixed[:, columns] = w[:, columns]
        return error(mixed) / error(rounded)

    a = x.abs().mean(0)
    losses = []
    for i in range(20):
        s = candidate(a, i / 20)
        losses.append(error(scheme.quantize(w * s) / s))
    return {
        "synthetic scale": min(losses) / error(rounded),
        "synthetic 1% by activation": kept(a.topk(5).indices),
        "synthetic 1% by weight": kept(w.norm(dim=0).topk(5).indices),
        "synthetic 1% at random": kept(torch.randperm(512, generator=g)[:5]),
    }


def measure(seed: int, say: Say) -> Figures:
    figures: Figures = {"float perplexity": float_perplexity(), **synthetic(seed)}
    for bits in (3, 4):
        figures |= measured(RTN(bits=bits, group=64), seed, say, f"RTN {bits}-bit")
        figures |= measured(AWQ(bits=bits, group=64), seed, say, f"AWQ {bits}-bit")
    figures |= measured(AWQ(bits=3, group=64, clip=False), seed, say, "AWQ 3-bit scale only")
    figures |= measured(AWQ(bits=3, group=64, grid=1), seed, say, "AWQ 3-bit clip only")
    figures |= measured(GPTQ(bits=3, group=64), seed, say, "GPTQ 3-bit")
    return figures


CLAIM = Claim(
    name="awq",
    sentence="Scaling salient input channels, found from activations, removes most of the error of low-bit round-to-nearest.",
    source="Lin et al., MLSys 2024, arXiv 2306.00978, tables 1, 3 and 4",
    work=f"{WORK}, at 3 and 4 bits; and Gaussian data (2048 tokens, 512 inputs)",
    data=data,
    measure=measure,
    paper={
        "Llama-2-7B INT3-g128 RTN": 6.66,
        "Llama-2-7B INT3-g128 AWQ": 6.24,
        "Llama-2-7B INT3-g128 GPTQ": 6.43,
        "Llama-2-7B float": 5.47,
    },
    tests=(
        Test(
            "AWQ closes at least 30 % of the log-perplexity gap between RTN and float at 3 bits",
            lambda f: gap_closed(f, "AWQ 3-bit", "RTN 3-bit") >= 0.3,
        ),
        Test("AWQ is no worse than RTN at 4 bits", lambda f: f["AWQ 4-bit perplexity"] <= f["RTN 4-bit perplexity"]),
        Test(
            "scaling alone is better than RTN at 3 bits",
            lambda f: f["AWQ 3-bit scale only perplexity"] < f["RTN 3-bit perplexity"],
        ),
        Test("synthetic: the scale at least halves the output error", lambda f: f["synthetic scale"] <= 0.5),
        Test(
            "synthetic: 1 % of inputs kept float by activation leave at most 30 % of the error",
            lambda f: f["synthetic 1% by activation"] <= 0.3,
        ),
        Test(
            "synthetic: 1 % by weight norm or at random leave at least 95 %",
            lambda f: min(f["synthetic 1% by weight"], f["synthetic 1% at random"]) >= 0.95,
        ),
    ),
    caveat=CAVEAT + " The paper's figures are quoted from memory.",
)
