"""VPTQ: Extreme Low-bit Vector Post-Training Quantization for Large Language Models.

Liu, Wen, Wang, Ye, Zhang, Cao, Li, Yang; EMNLP 2024; arXiv 2409.17066. The loop is `rounding.vector_columns`, the storage `formats.Codebook`. Bits a
weight of a matrix [M, N]: log2 k / v + log2 k2 / v + 16 v (k + k2) G / (M N), plus the outliers' and the norm's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from dither.formats import Codebook, WeightScheme
from dither.quant.parts import Part
from dither.quant.recipe import Method
from dither.quant.rounding.vector_columns import VectorColumns

EXACT = 8  # bits of the main index, where ``bits`` chooses the books: what is left goes to the residual book


@dataclass(frozen=True, kw_only=True)
class VPTQ(Method):
    """Vectors of ``vector_len`` outputs of one input, as indices into codebooks of float16 vectors.

    ``bits``: of the indices, a weight; they make books of up to 256 entries: 2 bits of vectors of 4 are 256 centroids, 3 bits 256 and a residual book
    of 16. ``centroids`` and ``residual`` choose the books by hand instead. ``outlier_percent`` of the columns, those with the largest inputs, get a
    book ``outlier`` = (vector, centroids) of their own; ``groups``: books that the other columns are divided between. ``perm``: columns in the order
    of falling H_jj. ``norm``: normalise each column. ``kmeans_iters``, ``init`` ("random", "spread"), ``seed``: of k-means. ``weighted=False``:
    k-means without the Hessian; ``compensate=False``: no error is passed on. ``refine``: rounds of least squares on the centroids and a new choice
    of indices (ours, where the paper tunes).
    """

    name: ClassVar[str] = "vptq"
    source: ClassVar[str] = "arXiv 2409.17066"
    unused: ClassVar[frozenset[str]] = frozenset({"group", "sym", "scale", "format"})

    bits: int = 2
    vector_len: int = 4  # with k = 256: the paper's v = 6, k = 4096 suits matrices of millions of weights
    centroids: int | None = None
    residual: int | None = None
    outlier_percent: float = 0.0  # table 9 of the paper: 0 to 2
    outlier: tuple[int, int] = (4, 4096)
    groups: int = 1
    perm: bool = True  # the code's --enable_perm
    norm: bool = False  # the code's --enable_norm
    kmeans_iters: int = 100
    init: str = "random"
    seed: int = 0
    weighted: bool = True  # section 3.2
    compensate: bool = True  # section 3.1
    damp: float = 0.01
    refine: int = 0

    def scheme(self) -> WeightScheme:
        if self.weights is not None:
            return self.weights
        k, k2 = self.centroids, self.residual
        if k is None:
            if k2 is not None:
                raise ValueError(f"residual: {k2} needs centroids too; or leave both out and give bits")
            width = self.bits * self.vector_len
            k = 1 << min(width, EXACT)
            k2 = 1 << (width - EXACT) if width > EXACT else None
        return Codebook(self.vector_len, k, k2, self.groups, self.outlier_percent, self.outlier, self.norm)

    def stages(self) -> Sequence[Part]:
        return [
            VectorColumns(
                perm=self.perm, kmeans_iters=self.kmeans_iters, damp=self.damp, refine=self.refine, weighted=self.weighted,
                compensate=self.compensate, init=self.init, seed=self.seed,
            )
        ]
