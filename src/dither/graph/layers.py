"""Which modules are layers: found by comparing what a module returns with x W^T + b."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.module import register_module_forward_hook

from dither.graph.bench import Bench
from dither.graph.exact import Call, Exact, bench_copy, execute, float64_default, relative_difference
from dither.graph.structure import Layer, Structure

EXACT = 1e-9  # relative difference up to which two float64 outputs are the same


@dataclass(frozen=True)
class Affine:
    """A module proved to compute x W^T + b of its one matrix and vector."""

    parameter: str
    swapped: bool
    bias: str | None
    takes_bias: bool


def layers_of(module: nn.Module) -> Structure:
    """Only the layers, without a sample: each module is run alone on random rows and kept if it computes x W^T + b. Every layer
    is its own group; there are no sites. Stacks of experts are recognised as three-dimensional parameters of modules without submodules."""
    layers: list[Layer] = []
    with float64_default():
        generator = torch.Generator().manual_seed(0)
        for name, part in module.named_modules():
            own = {n: p for n, p in part._parameters.items() if p is not None}
            full = f"{name}." if name else ""
            if isinstance(part, _ConvNd) and not isinstance(part, _ConvTransposeNd):
                layers.append(
                    Layer(
                        name,
                        full + "weight",
                        "conv",
                        part.in_channels,
                        part.out_channels,
                        tuple(part.weight.shape),
                        bias=full + "bias" if part.bias is not None else None,
                        group=len(layers),
                    )
                )
                continue
            affine = _affine_alone(part, name, generator)
            if affine is not None:
                weight = own[affine.parameter.rpartition(".")[2]]
                out, inp = weight.shape[::-1] if affine.swapped else weight.shape
                layers.append(
                    Layer(
                        name,
                        affine.parameter,
                        "linear",
                        inp,
                        out,
                        tuple(weight.shape),
                        affine.swapped,
                        affine.bias,
                        len(layers),
                    )
                )
                continue
            swapped = bool(getattr(part, "is_transposed", False))  # how transformers marks stacks stored [E, I, O]
            for key, p in own.items():
                if p.dim() == 3 and min(p.shape) > 1:
                    out, inp = p.shape[:0:-1] if swapped else p.shape[1:]
                    layers.append(
                        Layer(full + key, full + key, "experts", inp, out, tuple(p.shape), swapped, group=len(layers))
                    )
    return Structure(layers)


def _affine_alone(part: nn.Module, name: str, generator: torch.Generator) -> Affine | None:
    """`is_affine` of a module without submodules, tried on random rows of either width."""
    matrices = [p for p in part._parameters.values() if p is not None and p.dim() == 2]
    if any(True for _ in part.children()) or len(matrices) != 1:
        return None
    alone = bench_copy(part)
    for width in dict.fromkeys(reversed(matrices[0].shape)):
        x = torch.randn(2, 3, width, generator=generator, dtype=torch.float64)
        try:
            with torch.no_grad(), Exact():
                output = alone(x)
        except (RuntimeError, TypeError, IndexError, ValueError, AttributeError):
            continue  # it does not take rows of this width, or takes something else
        if isinstance(output, Tensor) and (found := is_affine(alone, name, x, output)) is not None:
            return found
    return None


def affine_modules(module: nn.Module, calls: Sequence[Call]) -> dict[str, Affine]:
    """Modules with one matrix whose output equals x W^T + b on the calls, by name."""
    names = {id(m): n for n, m in module.named_modules()}
    found: dict[str, Affine] = {}
    refuted: set[str] = set()

    def look(part: nn.Module, args: Any, output: Any) -> None:
        name = names.get(id(part))
        if name is None or name in refuted or not args or not isinstance(output, Tensor):
            return
        proved = is_affine(part, name, args[0], output)
        if proved is None:
            refuted.add(name)
            found.pop(name, None)
        else:
            found[name] = proved

    handle = register_module_forward_hook(look)
    try:
        with torch.no_grad(), Exact():
            execute(module, calls)
    finally:
        handle.remove()
    return found


def is_affine(part: nn.Module, name: str, x: Any, output: Tensor) -> Affine | None:
    """Whether ``output`` is x W^T + b of the matrix that ``part`` itself holds, in either storage order."""
    own = {n: p for n, p in part._parameters.items() if p is not None}
    matrices = [(n, p) for n, p in own.items() if p.dim() == 2]
    vectors = [(n, p) for n, p in own.items() if p.dim() == 1]
    if len(matrices) != 1 or len(matrices) + len(vectors) != len(own) or len(vectors) > 1:
        return None
    if not isinstance(x, Tensor) or not x.is_floating_point():
        return None
    key, w = matrices[0]
    bias = vectors[0] if vectors else None
    for swapped in (False, True):
        matrix = w.mT if swapped else w
        if x.shape[-1] != matrix.shape[1] or output.shape != (*x.shape[:-1], matrix.shape[0]):
            continue
        if bias is not None and bias[1].shape != matrix.shape[:1]:
            continue
        expected = F.linear(x, matrix, None if bias is None else bias[1])
        if relative_difference([output], [expected]) <= EXACT:
            full = f"{name}." if name else ""
            takes = any(p is None for p in part._parameters.values())
            return Affine(full + key, swapped, None if bias is None else full + bias[0], takes)
    return None


def read_layers(
    module: nn.Module, bench: Bench, affine: Mapping[str, Affine], ties: Sequence[tuple[str, str]]
) -> list[Layer]:
    """Quantizable weights among those that were read, in call order."""
    tied = {name for pair in ties for name in pair}
    by_parameter = {a.parameter: (name, a) for name, a in affine.items()}
    groups: dict[tuple[tuple[int, ...], ...], int] = {}
    layers = []
    for parameter, matrix in bench.matrices.items():
        group = groups.setdefault(bench.inputs[parameter], len(groups))
        view, weight = matrix.view, module.get_parameter(parameter)
        owner = parameter.rpartition(".")[0]
        marks: dict[str, Any] = {
            "group": group,
            "shape": tuple(weight.shape),
            "routes": parameter in bench.routes,
            "feeds_logits": parameter in bench.logits,
            "is_head": parameter in bench.tables or parameter in tied,
        }
        part = module.get_submodule(owner)
        if parameter in by_parameter:
            name, a = by_parameter[parameter]
            layers.append(
                Layer(name, parameter, "linear", view.inputs, view.outputs, swapped=a.swapped, bias=a.bias, **marks)
            )
        elif isinstance(part, _ConvNd) and not isinstance(part, _ConvTransposeNd):
            layers.append(
                Layer(owner, parameter, "conv", view.inputs, view.outputs, bias=bench.bias_of(parameter), **marks)
            )
        elif weight.dim() == 3:
            layers.append(
                Layer(
                    parameter,
                    parameter,
                    "experts",
                    view.inputs,
                    view.outputs,
                    swapped=view.swapped,
                    bias=bench.bias_of(parameter),
                    **marks,
                )
            )
    return layers
