"""Rotating the heads between two weights: values and the projection that reads what attention makes of them. (R2 of SpinQuant, 2024.)

Where a producer P feeds a consumer W through something that is linear and treats the d channels of a head alike (attention mixes tokens,
never the channels of a head), an orthogonal R_g [d, d] for each head g of the producer cancels:

    rows of head g:      P_g <- R_g^T P_g,    b_g <- R_g^T b_g          what head g hands on is y R_g
    columns of head h:   W_:h <- W_:h R_g(h)                            g(h): which producer head column block h reads; several under
                                                                        grouped-query attention

A scale site (`structure.Site`) already says which columns read which channels. That diagonal factors pass does not mean that rotations do
(the elementwise product of a gated feed-forward, a ReLU), so it is proved again: d is the largest block size for which random
rotations of blocks of d leave all outputs unchanged to 1e-9, in float64 on random weights. Sizes that hold are closed under divisors and
least common multiples (rotations of two overlapping blocks generate those of their union), so the largest is found by multiplying primes on;
a site that lets no rotation pass costs one run for each prime factor of its channels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dither.graph.fold import added_bias
from dither.graph.structure import Consumer, Site, Structure, matrix_view
from dither.graph.trial import Trial, trial


@dataclass(frozen=True, eq=False)
class HeadRotation:
    """A scale site whose channels fall into ``heads`` (G) runs of ``size`` (d), each of which may be rotated. G d = C."""

    site: Site
    size: int
    heads: int

    def heads_of(self, consumer: Consumer) -> Tensor:
        """``g(h) [I / d]``: the producer head that each run of d columns of a consumer reads; -1 where the site feeds none of them."""
        found = _heads_of(consumer, self.size)
        if found is None:
            raise ValueError(f"the columns of {consumer.name} are no runs of {self.size}")
        return found

    def __str__(self) -> str:
        readers = ", ".join(c.name for c in self.site.consumers)
        return f"rotation: {self.site.producer.name} -> {readers} ({self.heads} heads of {self.size})"


def find_head_rotations(
    module: nn.Module,
    calls: Sequence[tuple[Sequence[Any], Mapping[str, Any]]],
    structure: Structure,
    *,
    seed: int = 0,
) -> list[HeadRotation]:
    """The scale sites of ``structure`` (as `discover_block` gives it, with names inside ``module``) whose heads may be rotated.

    ``calls``: some of the module's calls ``(args, kwargs)``. The module is not changed. ValueError where ``calls`` is empty.
    """
    if not calls:
        raise ValueError("calls must hold at least one call of the module")
    sites = [s for s in structure.sites if _linear(s)]
    with trial(module, calls, seed) as bench:
        found = [one for one in (_largest(bench, site) for site in sites) if one is not None]
        while found and not _holds(bench, found):  # alone each of them held
            found.pop()
    return found


@torch.no_grad()
def rotate_heads(module: nn.Module, rotation: HeadRotation, rotations: Tensor) -> None:
    """Rotate the heads by ``rotations [G, d, d]`` in place, in float64; the module's function stays the same, its dtypes too.

    ValueError for another shape, and unless each matrix is orthogonal to 1e-6.
    """
    r = rotations.detach().double()
    size, heads = rotation.size, rotation.heads
    if r.shape != (heads, size, size):
        raise ValueError(f"rotations must be [{heads}, {size}, {size}], not {list(r.shape)}")
    error = float((r @ r.mT - torch.eye(size, dtype=r.dtype, device=r.device)).abs().max())
    if not error < 1e-6:
        raise ValueError(f"rotations must be orthogonal; they are off by {error:.1e}")
    producer = rotation.site.producer
    weight = module.get_parameter(producer.parameter)
    _turn_rows(matrix_view(weight, producer.kind, producer.swapped), producer.rows, r)
    bias: Tensor | None = None if producer.bias is None else module.get_parameter(producer.bias)
    if bias is None:
        bias = added_bias(module, producer.parameter, producer.outputs)
    if bias is not None:
        _turn_rows(bias.view(-1, 1), producer.rows, r)
    for consumer in rotation.site.consumers:
        weight = module.get_parameter(consumer.parameter)
        _turn_columns(matrix_view(weight, consumer.kind, consumer.swapped), rotation.heads_of(consumer), r)


def _turn_rows(matrix: Tensor, rows: Tensor, r: Tensor) -> None:
    """``matrix [O, I]``: the rows of each head, ``[d, I]``, become R^T times them."""
    rows, r = rows.to(matrix.device), r.to(matrix.device)
    heads = matrix[rows].double().view(r.shape[0], r.shape[1], -1)  # [G, d, I]
    matrix[rows] = (r.mT @ heads).reshape(len(rows), -1).to(matrix.dtype)


def _turn_columns(matrix: Tensor, heads: Tensor, r: Tensor) -> None:
    """``matrix [O, I]``: the columns of each run, ``[O, d]``, become them times R of the head that they read."""
    heads, r = heads.to(matrix.device), r.to(matrix.device)
    runs = matrix.double().reshape(len(matrix), len(heads), -1).transpose(0, 1)  # [H, O, d]
    turned = torch.where((heads >= 0)[:, None, None], runs @ r[heads.clamp(min=0)], runs)
    matrix.copy_(turned.transpose(0, 1).flatten(1).to(matrix.dtype))


def _linear(site: Site) -> bool:
    """Only matrices: stacks of experts and convolutions have no heads."""
    kinds = {site.producer.kind, *(c.kind for c in site.consumers)}
    return site.kind == "scale" and kinds == {"linear"}


def _heads_of(consumer: Consumer, size: int) -> Tensor | None:
    """``[I / d]`` if the consumer's columns are runs of d, each of which reads all channels of one head in order, or none."""
    if consumer.channel_map.numel() % size:
        return None
    runs = consumer.channel_map.view(-1, size)  # [H, d]
    first = runs[:, :1]
    whole = (first >= 0) & (first % size == 0) & (runs == first + torch.arange(size))
    if not bool((whole.all(1) | (runs < 0).all(1)).all()):
        return None
    return torch.where(first >= 0, first // size, first).squeeze(1)


def _largest(bench: Trial, site: Site) -> HeadRotation | None:
    """The largest heads of a site that may be rotated; None where it has none of two channels or more."""
    size, left, prime = 1, site.channels, 2
    while prime <= left:
        while left % prime == 0:
            left //= prime
            wider = _as_heads(site, size * prime)
            if wider is None or not _holds(bench, [wider]):
                while left % prime == 0:
                    left //= prime
                break
            size *= prime
        prime += 1
    return _as_heads(site, size) if size > 1 else None


def _as_heads(site: Site, size: int) -> HeadRotation | None:
    """The site cut into heads of ``size``, if its consumers' columns can be."""
    if any(_heads_of(c, size) is None for c in site.consumers):
        return None
    return HeadRotation(site, size, site.channels // size)


def _holds(bench: Trial, chosen: Sequence[HeadRotation]) -> bool:
    """Whether random rotations, all at once, leave every output as it was."""
    drawn = [_random_rotations(one, bench.generator) for one in chosen]
    for one, r in zip(chosen, drawn, strict=True):
        rotate_heads(bench.bench, one, r)
    holds = bench.unchanged()
    for one, r in zip(reversed(chosen), reversed(drawn), strict=True):
        rotate_heads(bench.bench, one, r.mT)
    return holds


def _random_rotations(rotation: HeadRotation, generator: torch.Generator) -> Tensor:
    """``[G, d, d]`` float64, uniform up to signs."""
    size = rotation.size
    q: Tensor = torch.linalg.qr(torch.randn(rotation.heads, size, size, generator=generator, dtype=torch.float64))[0]
    return q
