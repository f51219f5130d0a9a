"""Seeing what each expert of a stack reads.

A stack is one parameter ``[E, O, I]`` whose slices are multiplied one at a time; no module is called for an expert, so there is nothing to hook.
`opened` stands a tensor in its place that knows each product it takes part in (recognised by memory, as `graph.trace` does), and passes
what is about to be multiplied with expert e through a small module first: hooks on that module see the expert's input.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dither.graph import Layer
from dither.graph.trace import Parameters, Product, recognise

Mask = Callable[[], Tensor | None]


class _Watch:
    """Which parameters are watched, and the module that each of their experts' inputs passes through."""

    def __init__(self, module: nn.Module, layers: Sequence[Layer]) -> None:
        self.parameters = Parameters(module)
        self.experts = {x.parameter: [nn.Identity() for _ in range(x.shape[0])] for x in layers}

    def show(self, product: Product) -> None:
        view = product.view
        if view.name not in self.experts or view.col != 0 or view.inp != view.inputs:
            return
        x = product.x.movedim(product.x_dim, -1)
        for e in range(view.experts) if view.expert is None else [view.expert]:
            rows = x[e] if view.expert is None else x
            if rows.numel():
                self.experts[view.name][e](rows)


class _Watched(nn.Parameter):
    """A parameter, or a view of it, that shows its `_Watch` the products it takes part in."""

    watch: _Watch

    @classmethod
    def of(cls, tensor: Tensor, watch: _Watch) -> _Watched:
        made = torch.Tensor._make_subclass(cls, tensor.detach(), False)
        made.watch = watch
        return made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        watch = next((a.watch for a in (*args, *kwargs.values()) if isinstance(a, _Watched)), None)
        product = None
        if watch is not None:
            with torch._C.DisableTorchFunctionSubclass():
                product = recognise(func, args, kwargs, watch.parameters)
        if watch is not None and product is not None:
            watch.show(product)  # outside of any guard: whoever hooked in may run something else before this goes on
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **kwargs)
            is_view = watch is not None and product is None and type(result) is Tensor and watch.parameters.find(result) is not None
        return _Watched.of(result, watch) if is_view and watch is not None else result


@contextmanager
def opened(module: nn.Module, layers: Sequence[Layer], mask: Mask) -> Iterator[Mapping[str, Sequence[nn.Module]]]:
    """Within it, the input of expert e of the stack ``layer`` passes through ``[layer.name][e]``, rows ``[T, I]``.

    ``mask()``: which tokens ``[B, T]`` of the call at work are real (None: all). Experts are then run on those alone where they are given one
    row a token; padding leaves them as zeros.
    """
    stacks = [x for x in layers if x.kind == "experts"]
    watch = _Watch(module, stacks)
    owners: dict[str, nn.Module] = {}
    originals: list[tuple[nn.Module, str, nn.Parameter]] = []
    for layer in stacks:
        path, _, name = layer.parameter.rpartition(".")
        owners[path] = module.get_submodule(path)
        originals.append((owners[path], name, owners[path].get_parameter(name)))
    try:
        for owner, name, parameter in originals:
            owner._parameters[name] = _Watched.of(parameter, watch)
        for owner in owners.values():
            owner.__dict__["forward"] = _without_padding(type(owner).forward.__get__(owner), mask)
        yield {layer.name: watch.experts[layer.parameter] for layer in stacks}
    finally:
        for owner in owners.values():
            owner.__dict__.pop("forward", None)
        for owner, name, parameter in originals:
            owner._parameters[name] = parameter


def _without_padding(forward: Callable[..., Any], mask: Mask) -> Callable[..., Any]:
    """The same function on the rows of real tokens alone, where every token has a row."""

    def run(*args: Any, **kwargs: Any) -> Any:
        real = mask()
        real = None if real is None else real.reshape(-1)
        given = next((a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)), None)
        if real is None or given is None or given.dim() != 2 or len(given) != len(real):
            return forward(*args, **kwargs)

        def cut(value: Any) -> Any:
            return value[real] if isinstance(value, Tensor) and value.dim() and len(value) == len(real) else value

        def whole(value: Any) -> Any:
            if not isinstance(value, Tensor) or not value.dim() or len(value) != int(real.sum()):
                raise ValueError("experts returned something else than one row a token; give calibration batches without padding")
            filled = value.new_zeros(len(real), *value.shape[1:])
            filled[real] = value
            return filled

        out = forward(*(cut(a) for a in args), **{k: cut(v) for k, v in kwargs.items()})
        return tuple(whole(value) for value in out) if isinstance(out, tuple) else whole(out)

    return run
