"""VPTQ: rounds a weight column by column to vectors of a codebook, each column's error pushed onto the columns not yet rounded.

Liu et al., VPTQ: Extreme Low-bit Vector Post-Training Quantization, EMNLP 2024, arXiv 2409.17066; repository microsoft/VPTQ. A vector is v
consecutive outputs of one input j, so all its entries share (H^-1)_jj and the best centroid is the nearest one. For W [M, N], H = mean x x^T:

    C    = k-means of the vectors, each weighted by H_jj                              (section 3.2)
    U    upper triangular with (H + damp mean(diag H) I)^-1 = U^T U
    for column j:  q_j = nearest(w_j);  e = (w_j - q_j) / U_jj;  w_i <- w_i - e U_ji for i > j        (section 3.1, GPTQ's loop)
    R    = k-means of the compensated w_j - q_j; then once more from W with q = C[a] + R[b], b = nearest(w_j - C[a])     (section 3.3)

``refine`` goes on where the paper tunes: with D = W_hat - W, tr(D H D^T) is quadratic in the centroids and in each vector. A round

    C    <- argmin_C tr(D H D^T) for the indices at hand      (k v unknowns; conjugate gradients on the normal equations, their products
                                                               being decode, multiply by H, sum by index)
    a_rj <- nearest(w_hat_rj - (D H)_rj / H_jj), column by column      (coordinate descent: exact for one vector given all others)

never raises it; an update that float16 spoils is not taken. Time: N^3 / 3 for U, M N^2 / 2 a sweep, M N^2 a step of conjugate gradients, M N k an
assignment. Memory: 4 copies of W and of H.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from dither import kernels
from dither.formats import Codebook, Params, QTensor, Scheme, WeightScheme
from dither.quant.kmeans import INITS, weighted_kmeans
from dither.quant.parts import Rounded, Rounding
from dither.quant.rounding.columns import check_hessian, damped_inverse_factor
from dither.quant.statistics import HESSIAN, Statistics

LARGEST = 65504.0  # float16
logger = logging.getLogger("dither")
STEPS, ENOUGH = 24, 1e-6  # of conjugate gradients in a round: at most so many, until the squared gradient fell so far


@dataclass(frozen=True)
class VectorColumns(Rounding):
    """VPTQ as a part; its storage is a `Codebook`.

    ``perm``: columns in the order of falling H_jj, which also decides which are outliers and how columns are grouped; indices are stored in the
    natural order. ``weighted``: weigh k-means by H_jj. ``compensate``: push errors on. ``kmeans_iters``, ``init`` ("random" or "spread"),
    ``seed``: see `weighted_kmeans`. ``refine``: rounds of the alternation above. ``damp``: relative damping; grows until the factorisation holds.
    ``min_tokens``: below this many calibration tokens a layer is rounded to the nearest vectors of unweighted k-means instead.
    """

    perm: bool = True
    kmeans_iters: int = 100
    damp: float = 0.01
    refine: int = 0
    weighted: bool = True
    compensate: bool = True
    init: str = "random"
    seed: int = 0
    min_tokens: int = 32
    needs: ClassVar[frozenset[str]] = frozenset({HESSIAN})

    def __post_init__(self) -> None:
        if not self.damp > 0:
            raise ValueError(f"damp must be positive, not {self.damp}")
        if self.kmeans_iters < 1:
            raise ValueError(f"kmeans_iters must be at least 1, not {self.kmeans_iters}")
        if self.refine < 0:
            raise ValueError(f"refine must be 0 or more rounds, not {self.refine}")
        if self.init not in INITS:
            raise ValueError(f"init must be one of {', '.join(INITS)}, not {self.init!r}")

    def refuses(self, scheme: WeightScheme) -> str | None:
        return None if isinstance(scheme, Codebook) else f"VectorColumns rounds to codebooks of vectors, not to {scheme}"

    def round(self, weight: Tensor, scheme: Codebook, params: Params, statistics: Statistics | None) -> Rounded:
        if statistics is None or not statistics.has_hessian or statistics.tokens < self.min_tokens:
            seen = 0 if statistics is None else statistics.tokens
            return self._plain(weight, scheme, f"{seen} calibration tokens")
        hessian = statistics.hessian
        try:
            if scheme.norm or not self.compensate:
                return self.solve(weight, hessian, scheme)
            order = self.order(hessian)  # layers that read one tensor share the factor, also with GPTQ's loop
            key = ("factor", self.damp, self.perm)
            factor = statistics.derived(key, lambda: damped_inverse_factor(hessian, self.damp, order))
            return self.solve(weight, hessian, scheme, factor)
        except ArithmeticError as failure:
            return self._plain(weight, scheme, str(failure))

    def _plain(self, weight: Tensor, scheme: Codebook, why: str) -> Rounded:
        """Nearest vectors of unweighted k-means."""
        identity = torch.eye(weight.shape[1], dtype=torch.float64)
        part = VectorColumns(perm=False, kmeans_iters=self.kmeans_iters, compensate=False, init=self.init, seed=self.seed)
        found = part.solve(weight, identity, scheme)
        return Rounded(found.tensor, fallback=f"plain vector quantization: {why}", facts=found.facts)

    def order(self, hessian: Tensor) -> Tensor:
        """``[N]``: the columns in the order in which they are rounded."""
        if not self.perm:
            return torch.arange(len(hessian))
        diagonal = hessian.diagonal()
        return torch.argsort(torch.where(diagonal == 0, 1.0, diagonal), descending=True, stable=True)

    def solve(self, weight: Tensor, hessian: Tensor, scheme: Codebook, factor: tuple[Tensor, float] | None = None) -> Rounded:
        """``weight [M, N]``, ``hessian [N, N]`` float64, left as it is; ``factor``: what `damped_inverse_factor` gives for it, where that is
        known. Raises ArithmeticError where it has no factor, ValueError where the matrix does not fit the scheme."""
        rows, columns = weight.shape
        scheme.layout(rows, columns)
        if 2 * scheme.book_bits(rows, columns) > 16 * rows * columns:
            _warn_of_books(scheme, rows, columns)
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        work = weight.to(dtype, copy=True)
        dead = hessian.diagonal() == 0  # inputs that were always zero: their weights do not matter, and become zero
        work[:, dead] = 0
        affine = None
        if scheme.norm:
            scale, bias = _normal(work, dead)
            affine = (scale, bias)
            s = torch.where(dead, 1.0, scale.double())
            work = (work - bias) / s.to(dtype)
            hessian = hessian * s * s[:, None]  # the same objective: |x (W - W_hat)^T| does not change

        order = self.order(hessian)
        upper, damp = (None, 0.0)
        if self.compensate:
            upper, damp = factor or damped_inverse_factor(hessian, self.damp, order)
        metric = hessian[order[:, None], order]
        diagonal = metric.diagonal().clone()
        importance = diagonal.clone() if self.weighted else (diagonal > 0).double()
        diagonal[diagonal == 0] = 1
        metric.diagonal().copy_(diagonal + (damp or self.damp) * diagonal.mean())
        problem = _Problem(work[:, order].contiguous(), metric.to(dtype), importance, self._ranges(scheme, columns, dead[order], affine is not None))
        mix = torch.zeros(columns, columns, dtype=dtype) if upper is None else (upper / upper.diagonal()[:, None]).T.to(dtype).contiguous()

        empty = 0
        for part in problem.parts:
            empty += self._train(part, part.vectors(problem.target), importance, first=True)
        errors = problem.sweep(problem.target, mix)
        if scheme.residual is not None:
            for part in problem.parts:
                if part.k2:
                    empty += self._train(part, part.vectors(-errors), importance, first=False)
            problem.sweep(problem.target, mix)
        losses = [problem.loss()]
        for _ in range(self.refine):
            losses.append(problem.refine())
        facts: dict[str, Any] = {"book_bits": scheme.book_bits(rows, columns) / (rows * columns), "empty_centroids": empty}
        if self.refine:
            facts["refined"] = losses[-1] / losses[0] if losses[0] > 0 else 1.0
        tensor = QTensor.trusted(_stored(problem.parts, scheme, order, (rows, columns), affine), scheme, (rows, columns))
        return Rounded(tensor, loss=losses[-1] / 2, damp=damp if self.compensate else None, facts=facts)

    def _ranges(self, scheme: Codebook, columns: int, dead: Tensor, has_affine: bool) -> list[_Part]:
        """The outliers' columns and each group's, in the order of the sweep. Where a column is dead, one centroid is held at zero for it."""
        parts, first = [], scheme.outliers(columns)
        sizes = [(first, *scheme.outlier, 0)] if first else []
        sizes += [(size, scheme.vector, scheme.centroids, scheme.residual or 0) for size in scheme.group_sizes(columns)]
        start = 0
        for size, v, k, k2 in sizes:
            pinned = not has_affine and bool(dead[start : start + size].any())
            parts.append(_Part(slice(start, start + size), v, k, k2, pinned))
            start += size
        return parts

    def _train(self, part: _Part, vectors: Tensor, importance: Tensor, *, first: bool) -> int:
        """Fit the main (or the residual) book of ``part`` to its ``vectors [R, n, v]``; returns how many centroids no vector has."""
        count = vectors.shape[0]
        weight = importance[part.columns].expand(count, -1).reshape(-1)
        flat = vectors.reshape(-1, part.v)
        found = weighted_kmeans(flat, weight, part.k if first else part.k2, iterations=self.kmeans_iters, init=self.init, seed=self.seed)
        book = _half(found.centroids)
        if part.pinned:
            book[int(book.square().sum(1).argmin())] = 0
        part.books = [book] if first else [part.books[0], book]
        return found.empty


@dataclass
class _Part:
    """Columns that share a book (and a residual book)."""

    columns: slice
    v: int
    k: int
    k2: int  # 0: no residual book
    pinned: bool  # whether the shortest centroid is held at zero
    books: list[Tensor] = field(default_factory=list)  # [k, v], [k2, v], float16 values in the working type
    codes: Tensor | None = None  # [R, n] int32

    def padded(self, matrix: Tensor, fill: Tensor | None = None) -> Tensor:
        """The part's columns of ``matrix [M, N]``, with rows up to whole vectors: zeros, or the last ones of ``fill``."""
        own, short = matrix[:, self.columns], -matrix.shape[0] % self.v
        if not short:
            return own.contiguous()
        return torch.cat([own, own.new_zeros(short, own.shape[1]) if fill is None else fill[-short:]])

    def vectors(self, matrix: Tensor) -> Tensor:
        """``[M, N]`` -> ``[R, n, v]``."""
        return self.padded(matrix).view(-1, self.v, self.width).transpose(1, 2)

    @property
    def width(self) -> int:
        return int(self.columns.stop - self.columns.start)

    def indices(self) -> Iterator[tuple[int, Tensor]]:
        """Each book's number and its indices ``[R, n]``."""
        assert self.codes is not None
        codes = self.codes.long()
        yield 0, codes % self.k
        if len(self.books) > 1:
            yield 1, codes // self.k

    def decode(self, books: Sequence[Tensor]) -> Tensor:
        """``[R v, n]``, rows past M with it."""
        total: Tensor | None = None
        for i, index in self.indices():
            values = books[i][index]  # (R, n, v)
            total = values if total is None else total.add_(values)
        assert total is not None
        return total.transpose(1, 2).reshape(-1, self.width)

    def gather(self, gradient: Tensor) -> list[Tensor]:
        """The adjoint of `decode`: ``[R v, n]`` summed by index, one ``[k, v]`` a book."""
        parts = [gradient[i :: self.v].reshape(-1).double() for i in range(self.v)]
        sums = []
        for i, index in self.indices():
            flat, size = index.reshape(-1), len(self.books[i])
            sums.append(torch.stack([torch.bincount(flat, p, minlength=size) for p in parts], 1).to(gradient.dtype))
        return sums

    def free(self) -> list[Tensor]:
        """``[k, 1]`` a book: 1 where a centroid may move."""
        found = []
        for book in self.books:
            mask = torch.ones(len(book), 1, dtype=book.dtype)
            if self.pinned:
                mask[int(book.square().sum(1).argmin())] = 0
            found.append(mask)
        return found


@dataclass
class _Problem:
    """Minimise tr(D H D^T), D = W_hat - W, columns in the order of the sweep: ``target`` W [M, N], ``metric`` H [N, N] damped."""

    target: Tensor
    metric: Tensor
    importance: Tensor
    parts: list[_Part]

    def sweep(self, values: Tensor, mix: Tensor, present: list[Tensor] | None = None) -> Tensor:
        """Choose all codes in one pass over the columns (see `kernels.sweep_columns`), from ``values [M, N]`` and, for coordinate descent, the
        ``present`` values of each part. Returns e [M, N]."""
        work, errors = values.clone(), torch.empty_like(values)
        for i, part in enumerate(self.parts):
            own = part.columns
            base = None if present is None else present[i]
            book, residual = part.books[0], part.books[1] if len(part.books) > 1 else None
            start = part.padded(work, base)
            part.codes, e = kernels.sweep_columns(start, mix[own, own].contiguous(), book, residual, base)
            errors[:, own] = e[: len(values)]
            if own.stop < values.shape[1]:
                work[:, own.stop :].addmm_(errors[:, own], mix[own.stop :, own].T)
        return errors

    def decoded(self, books: Sequence[Sequence[Tensor]] | None = None) -> list[Tensor]:
        """Each part's values ``[R v, n]``."""
        return [part.decode(part.books if books is None else books[i]) for i, part in enumerate(self.parts)]

    def whole(self, values: list[Tensor]) -> Tensor:
        """``[M, N]``."""
        return torch.cat([x[: len(self.target)] for x in values], 1)

    def loss(self, difference: Tensor | None = None) -> float:
        """tr(D H D^T)."""
        d = self.whole(self.decoded()) - self.target if difference is None else difference
        return float(torch.sum((d @ self.metric) * d, dtype=torch.float64))

    def refine(self) -> float:
        """One round: centroids, then indices. Returns the loss, which is not above what it was."""
        self._centroids()
        present = self.decoded()
        whole = self.whole(present)
        slope = (whole - self.target) @ self.metric
        diagonal = self.metric.diagonal()
        before = float(torch.sum(slope * (whole - self.target), dtype=torch.float64))
        codes = [part.codes for part in self.parts]
        self.sweep(whole - slope / diagonal, -self.metric / diagonal[:, None], present)
        after = self.loss()
        if after > before:  # by rounding alone
            for part, old in zip(self.parts, codes, strict=True):
                part.codes = old
        return min(before, after)

    def _centroids(self) -> None:
        """The best centroids for the present indices: preconditioned conjugate gradients on ``A c = b`` from where they are."""
        difference = self.whole(self.decoded()) - self.target
        loss = self.loss(difference)
        free = [mask for part in self.parts for mask in part.free()]
        scale = self._diagonal()
        flat = [book for part in self.parts for book in part.books]

        def gathered(slope: Tensor) -> list[Tensor]:
            sums = []
            for part in self.parts:
                short = -len(slope) % part.v  # rows past M cost nothing
                sums += part.gather(torch.nn.functional.pad(slope[:, part.columns], (0, 0, 0, short)))
            return [s * mask for s, mask in zip(sums, free, strict=True)]

        def split(tensors: list[Tensor]) -> list[list[Tensor]]:
            rest = iter(tensors)
            return [[next(rest) for _ in part.books] for part in self.parts]

        residual = [-s for s in gathered(difference @ self.metric)]
        step = [torch.zeros_like(book) for book in flat]
        ready = [r / s for r, s in zip(residual, scale, strict=True)]
        direction, power = list(ready), _dot(residual, ready)
        first = power
        for _ in range(STEPS):
            if not power > ENOUGH * first:
                break
            product = gathered(self.whole(self.decoded(split(direction))) @ self.metric)
            curve = _dot(direction, product)
            if not curve > 0:
                break
            length = power / curve
            step = [s + length * d for s, d in zip(step, direction, strict=True)]
            residual = [r - length * p for r, p in zip(residual, product, strict=True)]
            ready = [r / s for r, s in zip(residual, scale, strict=True)]
            before, power = power, _dot(residual, ready)
            direction = [r + power / before * d for r, d in zip(ready, direction, strict=True)]
        moved = split([_half(book + s) for book, s in zip(flat, step, strict=True)])
        if self.loss(self.whole(self.decoded(moved)) - self.target) < loss:
            for part, books in zip(self.parts, moved, strict=True):
                part.books = books

    def _diagonal(self) -> list[Tensor]:
        """``[k, 1]`` a book: the sum of H_jj over each centroid's vectors, which A's diagonal is near to; 1 where it has none."""
        found = []
        for part in self.parts:
            own = self.metric.diagonal()[part.columns].double()
            for i, index in part.indices():
                total = torch.bincount(index.reshape(-1), own.expand(index.shape).reshape(-1), minlength=len(part.books[i]))
                found.append(torch.where(total > 0, total, 1.0)[:, None].to(self.metric.dtype))
        return found


def _dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    return sum(float(torch.sum(x * y, dtype=torch.float64)) for x, y in zip(a, b, strict=True))


@functools.cache
def _warn_of_books(scheme: Codebook, rows: int, columns: int) -> None:
    """Once for each size of matrix."""
    share = scheme.book_bits(rows, columns) / (16 * rows * columns)
    logger.warning("the books of a %s hold %.0f %% as many numbers as its %d x %d weights", scheme, 100 * share, rows, columns)


def _half(x: Tensor) -> Tensor:
    """The values that float16 holds, in x's type."""
    return x.clamp(-LARGEST, LARGEST).to(torch.float16).to(x.dtype)


def _normal(work: Tensor, dead: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and bias ``[N]`` of the columns, as float16 holds them: range and least entry; 0 and 0 for dead columns, 1 for constant ones."""
    low, high = work.amin(0), work.amax(0)
    scale = _half(high - low)
    scale = torch.where(scale == 0, 1.0, scale)
    return torch.where(dead, 0.0, scale), torch.where(dead, 0.0, _half(low))


def _stored(parts: list[_Part], scheme: Codebook, order: Tensor, shape: tuple[int, int], affine: tuple[Tensor, Tensor] | None) -> dict[str, Tensor]:
    """Indices back in the natural order of the columns."""
    extra: dict[str, Any] = {}
    main = parts
    if scheme.outliers(shape[1]):
        outlier, main = parts[0], parts[1:]
        assert outlier.codes is not None
        columns, back = order[outlier.columns].sort()
        extra = {"outlier_columns": columns, "outlier_codes": outlier.codes[:, back], "outlier_centroids": outlier.books[0]}
    back = order[main[0].columns.start :].argsort()
    if scheme.groups > 1:
        extra["groups"] = torch.cat([torch.full((part.width,), g) for g, part in enumerate(main)])[back]
    if scheme.residual is not None:
        extra["residuals"] = torch.stack([part.books[1] for part in main])
    codes = torch.cat([part.codes for part in main if part.codes is not None], 1)[:, back]
    return scheme.pack(codes, torch.stack([part.books[0] for part in main]), shape, affine=affine, **extra)


def vector_columns(weight: Tensor, hessian: Tensor, scheme: Codebook, **knobs: Any) -> QTensor:
    """Round ``weight [M, N]`` given ``hessian [N, N]`` = mean x x^T; see `VectorColumns` for the knobs."""
    if isinstance(scheme, Scheme):
        raise ValueError(f"scheme: must be a codebook, not {scheme}")
    check_hessian(hessian, weight.shape[1])
    return VectorColumns(**knobs).solve(weight, hessian.double(), scheme).tensor
