"""VPTQ (arXiv 2409.17066): vectors in codebooks, with the error passed on column by column, keep 2 bits usable where scalars collapse."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from dither import kernels
from dither.claims.claim import Claim, Figures, Say, Test
from dither.claims.work import CAVEAT, MODEL, SAMPLES, TOKENS, WORK, data, float_perplexity, measured, texts
from dither.formats import Codebook, Int, Params, WeightScheme, group
from dither.quant import Recipe, quantize
from dither.quant.kmeans import weighted_kmeans
from dither.quant.parts import Rounded
from dither.quant.recipes import GPTQ, VPTQ
from dither.quant.rounding.columns import columns, damped_inverse_factor
from dither.quant.rounding.nearest import nearest
from dither.quant.rounding.vector_columns import VectorColumns, vector_columns
from dither.quant.statistics import Statistics

TWO, THREE = Codebook(4, 256), Codebook(4, 256, 16)
BLOCKS = (2, 15, 28)  # of 30, whose layers are rounded by every arm
ITERATIONS = 30  # of k-means, there


def along_inputs(weight: Tensor, hessian: Tensor, scheme: Codebook, *, damp: float = 0.01, iterations: int = 100) -> Tensor:
    """The other way to lay vectors, as GPTVQ does: v consecutive inputs of one output. ``weight [M, N]`` float32 -> W_hat.

    An error can leave a vector only after all of it is chosen, and H enters the search: with U_b the vector's block of U, the centroid with
    the least ``|(x - c) U_b^-1|`` is taken, and ``E = (x - q) U_b^-1`` is passed on. Columns go in the order of falling H_jj, as VPTQ's do.
    Raises ValueError where v does not divide N.
    """
    v = scheme.vector
    if weight.shape[1] % v:
        raise ValueError(f"scheme: vectors of {v} do not divide {weight.shape[1]} inputs")
    order = hessian.diagonal().argsort(descending=True, stable=True)
    upper = damped_inverse_factor(hessian, damp, order)[0].float()
    work, found = weight[:, order].clone(), torch.empty_like(weight)
    importance = hessian.diagonal()[order].view(-1, v).mean(1)  # (N / v,)
    vectors = work.view(-1, v)
    book = weighted_kmeans(vectors, importance.repeat(len(weight)), scheme.centroids, iterations=iterations).centroids
    book = book.half().float()
    for j in range(0, weight.shape[1], v):
        own = upper[j : j + v, j : j + v]
        inverse = torch.linalg.solve_triangular(own, torch.eye(v), upper=True)
        x = work[:, j : j + v]
        codes = kernels.nearest_centroids((x @ inverse).contiguous(), (book @ inverse).contiguous())
        q = book[codes.long()]
        found[:, order[j : j + v]] = q
        work[:, j + v :].addmm_((x - q) @ inverse, upper[j : j + v, j + v :], alpha=-1)
    return found


@dataclass(frozen=True)
class SideBySide(VectorColumns):
    """VPTQ at 2 bits whose facts have the relative error tr(D H D^T) / tr(W H W^T) of every arm on the same weight and Hessian."""

    kmeans_iters: int = ITERATIONS

    needs: ClassVar[frozenset[str]] = VectorColumns.needs

    def round(self, weight: Tensor, scheme: Codebook, params: Params, statistics: Statistics | None) -> Rounded:
        rounded = super().round(weight, scheme, params, statistics)
        if statistics is None or rounded.fallback:
            return rounded
        h = statistics.hessian
        grids: Mapping[int, WeightScheme] = {bits: Int(bits) @ group(64) for bits in (2, 3)}
        short = {"kmeans_iters": self.kmeans_iters}
        found = {"VPTQ 2": rounded.tensor.dequantize(), "VPTQ 3": vector_columns(weight, h, THREE, **short).dequantize()}
        for bits, grid in grids.items():
            found[f"RTN {bits}"] = nearest(weight, grid).dequantize()  # type: ignore[arg-type]
            found[f"GPTQ {bits}"] = columns(weight, h, grid).dequantize()  # type: ignore[arg-type]
        found["plain VQ"] = vector_columns(weight, h, TWO, weighted=False, compensate=False, **short).dequantize()
        found["H-weighted VQ"] = vector_columns(weight, h, TWO, compensate=False, **short).dequantize()
        found["along inputs"] = along_inputs(weight, h, TWO, iterations=self.kmeans_iters)
        power = _power(weight, h)
        errors = {arm: _power(found[arm] - weight, h) / power for arm in found}
        return Rounded(rounded.tensor, rounded.loss, rounded.damp, facts=errors)


def _power(matrix: Tensor, hessian: Tensor) -> float:
    wide = matrix.double()
    return float(((wide @ hessian) * wide).sum())


def layer_errors(seed: int, say: Say) -> Figures:
    """Every arm on the layers of three blocks of the float model, on the same Hessians: mean error by arm and by kind of layer, and how many
    layers break an order."""
    calibration = texts()[0]
    skip = tuple(f"*.{i}.*" for i in range(100) if i not in BLOCKS)
    recipe = Recipe((SideBySide(),), TWO, skip=skip, name="side by side")
    rows = quantize(MODEL, recipe, calibration, samples=SAMPLES, length=TOKENS, seed=seed).report.layers
    arms = list(rows[0].facts)
    figures = {f"{arm} layer error": sum(row.facts[arm] for row in rows) / len(rows) for arm in arms}
    for kind in dict.fromkeys(row.name.rpartition(".")[2] for row in rows):
        own = [row.facts for row in rows if row.name.endswith(f".{kind}")]
        figures |= {f"{arm} layer error, {kind}": sum(facts[arm] for facts in own) / len(own) for arm in arms}
    for name, pairs in {
        "layers out of order": (("plain VQ", "H-weighted VQ"), ("H-weighted VQ", "VPTQ 2")),
        "layers where inputs win": (("along inputs", "VPTQ 2"),),
    }.items():
        figures[name] = float(sum(any(row.facts[worse] <= row.facts[better] for worse, better in pairs) for row in rows))
    say("  layer errors: " + ", ".join(f"{arm} {figures[arm + ' layer error']:.4f}" for arm in arms))
    return figures


def measure(seed: int, say: Say) -> Figures:
    figures: Figures = {"float perplexity": float_perplexity(), **layer_errors(seed, say)}
    figures |= measured(GPTQ(bits=2, group=64), seed, say, "GPTQ 2-bit")
    figures |= measured(GPTQ(bits=2, group=64, clip="output"), seed, say, "GPTQ 2-bit + clip")
    figures |= measured(VPTQ(centroids=256), seed, say, "VPTQ 2-bit")
    figures |= measured(VPTQ(centroids=512, refine=8), seed, say, "VPTQ 2.3-bit refined")
    figures |= measured(GPTQ(bits=3, group=64, clip="output"), seed, say, "GPTQ 3-bit + clip")
    figures |= measured(VPTQ(centroids=256, residual=16), seed, say, "VPTQ 3-bit")
    return figures


CLAIM = Claim(
    name="vptq",
    sentence="Vector codebooks with Hessian-weighted centroids and second-order compensation take 2 bits with far less loss than scalars.",
    source="Liu et al., EMNLP 2024, arXiv 2409.17066, table 2; repository microsoft/VPTQ",
    work=f"{WORK}, at 2 and 3 bits; layer errors on blocks {', '.join(map(str, BLOCKS))} with {ITERATIONS} k-means iterations",
    data=data,
    measure=measure,
    paper={"LLaMA-2-7B 2.02-bit VPTQ": 6.13, "LLaMA-2-7B 2.125-bit GPTQ": 50.75, "LLaMA-2-7B float": 5.12},
    tests=(
        Test("on every layer, plain VQ > H-weighted VQ > VPTQ in output error", lambda f: f["layers out of order"] == 0),
        Test(
            "VPTQ's layer error is at most half of H-weighted VQ's, on average",
            lambda f: f["VPTQ 2 layer error"] <= 0.5 * f["H-weighted VQ layer error"],
        ),
        Test(
            "VPTQ's layer error is at most 0.7 of 2-bit GPTQ's, which spends more bits, on average",
            lambda f: f["VPTQ 2 layer error"] <= 0.7 * f["GPTQ 2 layer error"],
        ),
        Test("on every layer, vectors along outputs are better than along inputs", lambda f: f["layers where inputs win"] == 0),
        Test(
            "VPTQ's 2-bit perplexity is below 2-bit GPTQ's with and without clipping search, and below 100",
            lambda f: f["VPTQ 2-bit perplexity"] < min(f["GPTQ 2-bit perplexity"], f["GPTQ 2-bit + clip perplexity"], 100.0),
        ),
        Test(
            "VPTQ's 3-bit perplexity is at most 5 % above GPTQ's with clipping search, which spends more bits",
            lambda f: f["VPTQ 3-bit perplexity"] <= 1.05 * f["GPTQ 3-bit + clip perplexity"],
        ),
    ),
    caveat=CAVEAT + " The paper's figures are of a model 50 times larger, with its centroids tuned afterwards.",
)
