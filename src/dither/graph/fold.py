"""The rewrites that sites allow, done in place on parameters. Each keeps the parameters' dtypes; products are made in float64."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dither.graph.structure import Consumer, Producer, Site, matrix_view


def apply_scale(model: nn.Module, site: Site, scale: Tensor) -> None:
    """Divide the producer's channels by ``scale [C]`` and multiply the consumers' columns by it. ValueError unless it is finite and > 0."""
    _check(site, "scale", scale)
    if not bool((torch.isfinite(scale) & (scale > 0)).all()):
        raise ValueError(
            f"scale must be finite and positive; its range is [{float(scale.min())}, {float(scale.max())}]"
        )
    with torch.no_grad():
        scale_producer(model, site.producer, 1.0 / scale.double())
        for consumer in site.consumers:
            scale_columns(model, consumer, consumer.expand(scale.double()))


def apply_shift(model: nn.Module, site: Site, delta: Tensor) -> None:
    """Subtract ``delta [C]`` from the producer's channels; the consumers' biases take it up: b + W delta.

    Producers and consumers without a bias get one (a Linear or Conv module whose ``bias`` is None). ValueError unless it is finite.
    """
    _check(site, "shift", delta)
    if not bool(torch.isfinite(delta).all()):
        raise ValueError("delta must be finite")
    with torch.no_grad():
        p = site.producer
        target = model.get_parameter(p.parameter) if p.is_vector else _bias(model, p.name, p.bias, p.outputs)
        full = torch.zeros(p.outputs, dtype=torch.float64, device=target.device)
        full[p.rows.to(target.device)] = delta.double().to(target.device)
        _assign(target, target.double() - full.view(target.shape))
        for consumer in site.consumers:
            moved = _response(model, consumer, consumer.expand(delta.double(), fill=0.0))  # [O] or [E, O]
            bias = _bias(model, consumer.name, consumer.bias, moved.numel())
            _assign(bias, bias.double() + moved.view(bias.shape))


def scale_producer(model: nn.Module, producer: Producer, factor: Tensor) -> None:
    """Multiply the producer's channels by ``factor [C]``, float64."""
    weight = model.get_parameter(producer.parameter)
    full = torch.ones(producer.outputs, dtype=torch.float64, device=weight.device)
    full[producer.rows.to(weight.device)] = factor.to(weight.device)
    if producer.is_vector:
        scaled = (weight.double() + producer.offset) * full.view(weight.shape) - producer.offset
        _assign(weight, scaled)
    else:
        matrix = matrix_view(weight, producer.kind, producer.swapped)
        _assign(matrix, matrix.double() * full.view(*matrix.shape[:-1], 1))
    bias: Tensor | None = None if producer.bias is None else model.get_parameter(producer.bias)
    if bias is None and not producer.is_vector:
        bias = added_bias(model, producer.parameter, producer.outputs)
    if bias is not None:
        _assign(bias, bias.double() * full.view(bias.shape))


def scale_columns(model: nn.Module, consumer: Consumer, factor: Tensor) -> None:
    """Multiply the consumer's input columns by ``factor [I]`` (stacks ``[E * I]``), float64."""
    columns = column_view(model.get_parameter(consumer.parameter), consumer)
    factor = factor.to(columns.device)
    _assign(columns, columns.double() * factor.view(columns.shape[0], 1, columns.shape[2], 1))


def column_view(weight: Tensor, consumer: Consumer) -> Tensor:
    """A weight as ``[S, O, I, k]`` with its input columns in the order of ``channel_map`` read as ``[S, I]``: S is the number of experts
    of a stack or of groups of a convolution (then O is per group), k the size of the kernel. A view."""
    if consumer.kind == "conv":
        return weight.view(consumer.groups, weight.shape[0] // consumer.groups, weight.shape[1], -1)
    matrix = matrix_view(weight, consumer.kind, consumer.swapped)
    return (matrix if consumer.kind == "experts" else matrix[None])[..., None]


def _response(model: nn.Module, consumer: Consumer, values: Tensor) -> Tensor:
    """``W v`` for an input ``v [I]`` that is the same everywhere: ``[O]``, of a stack ``[E * O]``."""
    columns = column_view(model.get_parameter(consumer.parameter), consumer).double()  # [S, O, I, k]
    values = values.to(columns.device).view(columns.shape[0], 1, -1, 1)
    return (columns * values).sum((2, 3)).flatten()


def added_bias(model: nn.Module, weight: str, size: int) -> Tensor | None:
    """The bias beside a weight that had none when it was examined: an earlier shift may have created it."""
    bias = model.get_submodule(weight.rpartition(".")[0])._parameters.get("bias")
    return bias if bias is not None and bias.numel() == size else None


def _bias(model: nn.Module, module: str, name: str | None, size: int) -> Tensor:
    if name is not None:
        return model.get_parameter(name)
    owner = model.get_submodule(module)
    if owner._parameters.get("bias", 0) is None:
        like = next(p for p in owner._parameters.values() if p is not None)
        owner.bias = nn.Parameter(like.new_zeros(size), requires_grad=like.requires_grad)
    bias = owner._parameters.get("bias")
    if bias is None:
        raise ValueError(f"{module} has no bias and takes none")
    return bias


def _assign(target: Tensor, value: Tensor) -> None:
    target.copy_(value.to(target.dtype))


def _check(site: Site, kind: str, values: Tensor) -> None:
    if site.kind != kind:
        raise ValueError(f"site must be a {kind} site, not {site}")
    if values.shape != (site.channels,):
        raise ValueError(f"{site} needs {site.channels} values, not {tuple(values.shape)}")
