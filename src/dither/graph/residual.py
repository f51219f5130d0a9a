"""Rotating a residual stream: x -> x Q on the stream, undone where it is read. (Ashkboos et al., SliceGPT and QuaRot, 2024.)

A stream of width D can be rotated if modules only *add* to it, and if what is read from it is x up to a factor a token:

    RMSNorm(x Q) = RMSNorm(x) Q                              once the norm's own factor is folded into its readers
    LayerNorm(x Q) = LayerNorm(x) Q    if Q 1 = 1            the mean over channels is x 1 / D, so Q must fix the vector of ones

Proof, in float64 on random weights: (1) a writer P answers a separable probe u = a_t v_c on the last block's output with a gradient
that is a multiple of v for every row of P; a norm or a nonlinearity between P and the stream breaks that, and P is no writer. (2) With all
writers' outputs rotated and every factor set to 1, each weight's input is either x Q, or unchanged. (3) The rewritten model
gives the same output. Requiring Q 1 = 1 keeps LayerNorm models inside their architecture: nothing is replaced by an RMSNorm.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dither.graph.bench import Bench
from dither.graph.channel_map import SAME
from dither.graph.exact import Call, float_outputs, randomize, relative_difference, run_exactly
from dither.graph.fold import added_bias, scale_columns, scale_producer
from dither.graph.structure import Residual, Site, Weight, matrix_view
from dither.graph.trace import Leaves, Seen

PARALLEL = 1e-8  # relative distance of a gradient from the line that it should lie on


# -- rewriting ----------------------------------------------------------------------------------------------------------


def rotate_residual(model: nn.Module, residual: Residual, rotation: Tensor) -> None:
    """Rotate a proved stream by ``rotation [D, D]`` in place; the model's function stays the same.

    Norm factors are folded into their readers, tied parameters are separated (and ``config.tie_word_embeddings`` cleared). ValueError
    unless the rotation is orthogonal and, for a ``centred`` stream, maps the vector of ones to itself, or where a norm that adds
    a bias has a factor of 0.
    """
    q = rotation.detach().double()
    width = residual.width
    if q.shape != (width, width):
        raise ValueError(f"rotation must be [{width}, {width}], not {list(q.shape)}")
    error = float((q @ q.mT - torch.eye(width, dtype=q.dtype, device=q.device)).abs().max())
    if not error < 1e-6:
        raise ValueError(f"rotation must be orthogonal; it is off by {error:.1e}")
    if residual.centred and not float((q.sum(1) - 1).abs().max()) < 1e-6:
        raise ValueError(
            "rotation must map the vector of ones to itself, because norms of this stream subtract the mean; see fix_ones"
        )
    fold_norms(model, residual)
    with torch.no_grad():
        for site in residual.norms:
            if site.producer.bias is not None:
                _rotate(model, Weight(site.producer.bias, "table"), q, reads=False)
        tables = {w.parameter for w in residual.writers if w.kind == "table"}
        for writer in residual.writers:
            _rotate(model, writer, q, reads=False)
            bias = f"{writer.parameter.rpartition('.')[0]}.bias".lstrip(".")
            if writer.kind != "table" and bias not in tables and added_bias(model, writer.parameter, width) is not None:
                _rotate(model, Weight(bias, "table"), q, reads=False)
        for reader in residual.readers:
            _rotate(model, reader, q, reads=True)


@torch.no_grad()
def fold_norms(model: nn.Module, residual: Residual) -> None:
    """The first half of `rotate_residual`: separate tied parameters, move the factors of norms into their readers. In place; the function stays
    the same. ValueError where a norm that adds a bias has a factor of 0."""
    _separate(model, residual)
    for site in residual.norms:
        _fold_norm(model, site)


def _rotate(model: nn.Module, weight: Weight, q: Tensor, *, reads: bool) -> None:
    """What is written becomes ``y Q``: W <- Q^T W, tables P <- P Q. What reads ``x Q``: W <- W Q."""
    parameter = model.get_parameter(weight.parameter)
    q = q.to(parameter.device)
    target = parameter if weight.kind == "table" else matrix_view(parameter, weight.kind, weight.swapped)
    value = target.double() @ q if reads or weight.kind == "table" else q.mT @ target.double()
    target.copy_(value.to(target.dtype))


def _fold_norm(model: nn.Module, site: Site) -> None:
    """Move a norm's factor into its readers, whatever its signs."""
    producer = site.producer
    factor = (model.get_parameter(producer.parameter).double() + producer.offset).flatten()[producer.rows]
    zero = factor == 0
    if bool(zero.any()) and producer.bias is not None:
        raise ValueError(
            f"{producer.name} adds a bias to channels whose factor is 0; its factor cannot be folded into the readers"
        )
    for consumer in site.consumers:
        scale_columns(model, consumer, consumer.expand(factor))
    scale_producer(model, producer, torch.where(zero, 1.0, 1.0 / factor))
    weight = model.get_parameter(producer.parameter).view(-1)
    weight[producer.rows.to(weight.device)] = 1.0 - producer.offset  # exactly, also where it was 0


def _separate(model: nn.Module, residual: Residual) -> None:
    """Give tied parameters their own copies, and tell the configuration, so that saving keeps both."""
    for name, first in residual.ties:
        if model.get_parameter(name) is model.get_parameter(first):
            owner, _, leaf = name.rpartition(".")
            shared = model.get_parameter(name)
            setattr(
                model.get_submodule(owner),
                leaf,
                nn.Parameter(shared.detach().clone(), requires_grad=shared.requires_grad),
            )
            config: Any = getattr(model, "config", None)
            if getattr(config, "tie_word_embeddings", False):
                config.tie_word_embeddings = False
            getattr(model, "all_tied_weights_keys", {}).pop(name, None)  # transformers would tie them again


def fix_ones(rotation: Tensor) -> Tensor:
    """From an orthogonal ``[D - 1, D - 1]`` the orthogonal ``[D, D]`` that acts alike on the complement of the vector of ones, and maps that
    vector to itself: H diag(1, R) H with the Householder reflection H that swaps the first axis and the normalised ones."""
    r = rotation.double()
    if r.dim() != 2 or r.shape[0] != r.shape[1]:
        raise ValueError(f"rotation must be square, not {list(r.shape)}")
    width = r.shape[0] + 1
    h = ones_reflection(width).to(r.device)
    inner = torch.eye(width, dtype=r.dtype, device=r.device)
    inner[1:, 1:] = r
    return h @ inner @ h


def ones_reflection(width: int) -> Tensor:
    """The symmetric orthogonal ``[D, D]``, float64, that swaps the first axis and the normalised vector of ones; its other columns span the
    complement of that vector."""
    normal = torch.full((width,), -1 / math.sqrt(width), dtype=torch.float64)
    normal[0] += 1
    normal = normal / normal.norm() if width > 1 else normal
    return torch.eye(width, dtype=torch.float64) - 2 * torch.outer(normal, normal)


def random_rotation(residual: Residual, seed: int = 0) -> Tensor:
    """A random rotation ``[D, D]``, float64, that the stream allows."""
    generator = torch.Generator().manual_seed(seed)
    return _draw(residual.width, residual.centred, generator)


def _draw(width: int, centred: bool, generator: torch.Generator) -> Tensor:
    size = width - 1 if centred else width
    q, r = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    q = q * r.diagonal().sign()  # uniform over the orthogonal group
    return fix_ones(q) if centred else q


# -- proving ------------------------------------------------------------------------------------------------------------


class NotProved(Exception):
    """Why a stream may not be rotated."""


def find_residual(
    module: nn.Module,
    calls: Sequence[Call],
    chain: int,
    blocks: Sequence[str],
    norms: Sequence[Site],
    ties: Sequence[tuple[str, str]],
    layouts: dict[str, Weight],
    blocked: dict[str, str],
    seed: int,
) -> Residual:
    """The stream that runs through ``blocks``. `NotProved` says what is in the way. ``module``: an untied bench copy.

    ``norms``: scale sites of norms; ``layouts``: every weight that is read; ``blocked``: weights that may not be touched, and why.
    """
    bench = Bench(module, calls, (), seed)
    writers, width, suspect = _writers(bench, blocks, layouts)
    norms = [s for s in norms if s.producer.is_vector and _whole_width(s, width)]
    centred = False
    try:
        readers = _readers(bench, writers, norms, _draw(width, False, bench.generator))
    except NotProved:
        centred = True
        try:
            readers = _readers(bench, writers, norms, _draw(width, True, bench.generator))
        except NotProved as reason:
            raise NotProved(suspect or str(reason)) from None
    if not any(w.kind != "table" for w in writers) or not readers:
        raise NotProved(suspect or "no weight adds to it, or none reads it")
    for name in [w.parameter for w in writers] + readers:
        if name in blocked:
            raise NotProved(blocked[name])
        if name in readers and layouts[name].kind == "conv":
            raise NotProved(f"{name} convolves the stream")
    between = tuple(s for s in norms if {c.parameter for c in s.consumers} <= set(readers))
    touched = {w.parameter for w in writers} | set(readers)
    stream = Residual(
        width,
        chain,
        tuple(writers),
        tuple(layouts[n] for n in readers),
        between,
        centred,
        tuple(t for t in ties if touched & set(t)),
    )
    randomize(module, bench.generator)
    before = run_exactly(module, calls)
    rotate_residual(module, stream, _draw(width, centred, bench.generator))
    error = relative_difference(run_exactly(module, calls), before)
    if not error <= SAME:
        raise NotProved(f"rotating it changed the output by {error:.1e}")
    return stream


def _whole_width(site: Site, width: int) -> bool:
    """Whether a norm's factor covers all channels in order."""
    straight = torch.arange(width)
    return site.channels == site.producer.outputs == width and all(
        c.channel_map.numel() % width == 0 and bool((c.channel_map.view(-1, width) == straight).all())
        for c in site.consumers
    )


def _writers(bench: Bench, blocks: Sequence[str], layouts: dict[str, Weight]) -> tuple[list[Weight], int, str | None]:
    """Step 1: the weights and tables that add to the stream, its width, and the first weight that acts on it in another way.

    Such a weight need not be an obstacle: a router scales whole tokens. Steps 2 and 3 tell."""
    module = bench.module
    randomize(module, bench.generator)
    others = {n: p for n, p in module.named_parameters() if p.is_floating_point() and n not in layouts}
    caught: list[Tensor] = []
    handle = module.get_submodule(blocks[-1]).register_forward_hook(
        lambda _m, _a, out: caught.extend(float_outputs(out)[:1])
    )
    for p in others.values():
        p.requires_grad_(True)
    leaves: dict[str, Leaves] = {}
    try:
        bench.note(bench.watch(leaves, grad=True))
    finally:
        handle.remove()
    stream = caught[0]  # [..., D]
    width = stream.shape[-1]
    draw = bench.generator
    v = torch.randn(width, generator=draw, dtype=torch.float64)
    a = torch.randn((*stream.shape[:-1], 1), generator=draw, dtype=torch.float64)
    names = [*leaves, *others]
    tensors = [*(leaf.shift for leaf in leaves.values()), *others.values()]
    grads = torch.autograd.grad([stream], tensors, [a * v], allow_unused=True)
    for p in others.values():
        p.requires_grad_(False)
    found, suspect = [], None
    for name, g in zip(names, grads, strict=True):
        if g is None or not bool((g != 0).any()):
            continue
        is_table = name in others
        if (g.shape[-1] if is_table else bench.matrices[name].view.outputs) == width:
            rows = g.reshape(-1, width)
            off = rows - (rows @ v / (v @ v))[:, None] * v
            if not bool((off.norm(dim=1) > PARALLEL * rows.norm(dim=1)).any()):
                found.append(Weight(name, "table") if is_table else layouts[name])
                continue
        suspect = suspect or f"{name} does not simply add to it: something changes its channels on the way"
    return found, width, suspect


@torch.no_grad()
def _readers(bench: Bench, writers: Sequence[Weight], norms: Sequence[Site], q: Tensor) -> list[str]:
    """Step 2: which weights see the rotated stream. `NotProved` where something sees neither it nor what was there before."""
    module = bench.module
    randomize(module, bench.generator)
    for site in norms:
        module.get_parameter(site.producer.parameter).fill_(1.0 - site.producer.offset)
        if site.producer.bias is not None:
            module.get_parameter(site.producer.bias).zero_()
    base = bench.watch({})
    mixed = {}
    for writer in writers:
        if writer.kind == "table":
            table = module.get_parameter(writer.parameter)
            table.copy_(table @ q)
        else:
            size = bench.matrices[writer.parameter].view
            count = size.outputs * size.experts
            mixed[writer.parameter] = Leaves(torch.ones(count, dtype=q.dtype), torch.zeros(count, dtype=q.dtype), q)
    now = bench.watch(mixed, replay=base)
    if relative_difference(now.outputs, base.outputs) > SAME or relative_difference(now.ranked, base.ranked) > SAME:
        raise NotProved("the model returns it, not only what weights make of it")
    return _rotated(base, now, q)


def _rotated(base: Seen, now: Seen, q: Tensor) -> list[str]:
    state: dict[str, bool] = {}
    for before, after in zip(base.reads, now.reads, strict=True):
        if not before.x.numel():
            continue
        same = relative_difference([after.x], [before.x]) <= SAME
        turned = before.x.shape[-1] == len(q) and relative_difference([after.x], [before.x @ q]) <= SAME
        if same == turned or state.setdefault(before.view.name, turned) != turned:
            raise NotProved(f"{before.view.name} reads it otherwise than through a norm")
    return [name for name, turned in state.items() if turned]
