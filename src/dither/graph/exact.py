"""Running a module in float64 throughout, on a copy with random weights: the bench on which every proof is made.

Models drop to float32 on purpose (norms, softmax, rotary tables), which would bury a proof at 1e-9 under rounding. `Exact`
intercepts each torch function and widens every float type that it is asked for to float64.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from dither.graph.tree import map_tensors, tensors_of

Args = tuple[Any, ...]
Kwargs = dict[str, Any]
Call = tuple[Args, Kwargs]

PATTERN = 1048573  # random numbers drawn for one parameter before they repeat; a prime, so that no two rows are alike

_NARROWING = {Tensor.float, Tensor.half, Tensor.bfloat16}


def widen(func: Callable[..., Any], args: Args, kwargs: Kwargs) -> tuple[Callable[..., Any], Args, Kwargs]:
    """The same call with float64 in place of any other float type."""
    if func in _NARROWING:
        return Tensor.double, args[:1], {}
    if func is Tensor.type_as or (func is Tensor.to and len(args) > 1 and isinstance(args[1], Tensor)):
        kind = args[1].dtype
        return Tensor.to, (args[0], torch.float64 if kind.is_floating_point else kind), {}
    if any(isinstance(a, torch.dtype) for a in args) or "dtype" in kwargs:
        args = tuple(_double(a) for a in args)
        kwargs = {k: _double(v) for k, v in kwargs.items()}
    return func, args, kwargs


def _double(value: Any) -> Any:
    return torch.float64 if isinstance(value, torch.dtype) and value.is_floating_point else value


class Exact(TorchFunctionMode):
    """Inside this mode no torch function returns a float narrower than float64, unless it got one."""

    def __torch_function__(self, func: Any, types: Any, args: Args = (), kwargs: Kwargs | None = None) -> Any:
        func, args, kwargs = widen(func, args, kwargs or {})
        return self.handle(func, args, kwargs)

    def handle(self, func: Callable[..., Any], args: Args, kwargs: Kwargs) -> Any:
        """What the mode does with each call; `trace.Trace` watches here."""
        return func(*args, **kwargs)


@contextmanager
def float64_default() -> Iterator[None]:
    """Tensors made from Python numbers are float64 inside; the caller's random state is left as it was."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        torch.set_default_dtype(before)


def bench_copy(module: nn.Module) -> nn.Module:
    """A float64 copy on the CPU in evaluation mode, without caches, whose parameters are not trained and own their memory."""
    bench = copy.deepcopy(module).cpu().double().eval().requires_grad_(False)
    for part in bench.modules():
        config: Any = getattr(part, "config", None)
        if getattr(config, "use_cache", None):
            config.use_cache = False  # a cache would grow from run to run
        if getattr(config, "_experts_implementation", None) is not None:
            config._experts_implementation = (
                "eager"  # one expert at a time, so that each weight read is a view of the stack
            )
    for parameter in bench.parameters():
        parameter.data = parameter.data.contiguous()
    return bench


def untie(module: nn.Module) -> tuple[tuple[str, str], ...]:
    """Give every parameter known under several names its own copy under each; returns pairs (name, first name)."""
    first: dict[int, str] = {}
    ties = []
    for name, parameter in list(module.named_parameters(remove_duplicate=False)):
        if id(parameter) not in first:
            first[id(parameter)] = name
            continue
        owner, _, leaf = name.rpartition(".")
        holder = module.get_submodule(owner)
        if holder is module.get_submodule(first[id(parameter)].rpartition(".")[0]):
            continue  # one module under two names
        setattr(holder, leaf, nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad))
        ties.append((name, first[id(parameter)]))
    return tuple(ties)


def exact_calls(calls: Sequence[Call]) -> list[Call]:
    """The calls with every tensor on the CPU, floats in float64."""

    def double(t: Tensor) -> Tensor:
        return t.detach().cpu().double() if t.is_floating_point() else t.cpu()

    return [(map_tensors(tuple(args), double), map_tensors(dict(kwargs), double)) for args, kwargs in calls]


def as_call(sample: Any) -> Call:
    """A model's sample (a tensor, a tuple of arguments, a mapping of named ones) as one call."""
    if isinstance(sample, Tensor):
        return (sample,), {}
    if isinstance(sample, Mapping):
        return (), dict(sample)
    if isinstance(sample, list | tuple):
        return tuple(sample), {}
    raise TypeError(
        f"sample must be a tensor, a tuple of arguments or a dict of named ones, not {type(sample).__name__}"
    )


def execute(module: nn.Module, calls: Sequence[Call]) -> list[Any]:
    """Run the calls, always on the same random numbers. Objects that are no tensors (caches) are copied first, since a run may
    change them."""
    torch.manual_seed(0)
    outputs = []
    for args, kwargs in calls:
        memo: dict[int, Any] = {id(t): t for t in tensors_of([args, kwargs])}
        args, kwargs = copy.deepcopy((args, kwargs), memo)
        outputs.append(module(*args, **kwargs))
    return outputs


def float_outputs(outputs: Any) -> list[Tensor]:
    return [t for t in tensors_of(outputs) if t.is_floating_point()]


def run_exactly(module: nn.Module, calls: Sequence[Call]) -> list[Tensor]:
    """All float tensors that the calls return, computed in float64."""
    with torch.no_grad(), Exact():
        return float_outputs(execute(module, calls))


@torch.no_grad()
def randomize(
    module: nn.Module, generator: torch.Generator, *, louder: Collection[str] = (), gain: float = 1.0
) -> None:
    """Replace every float parameter by uniform random numbers of about its mean and spread; the spread of a matrix is at least
    1 / sqrt(fan-in), so that signals survive the way through networks that were initialised small.

    What feeds what is a property of the code, not of the weights; but fresh weights (norm factors of 1, biases of 0) and real
    ones (channels that a ReLU never lets through) can hide it. Each call with the same generator gives other channels a chance. Parameters
    named in ``louder`` are multiplied by ``gain``.
    """
    for name, parameter in module.named_parameters():
        if not parameter.is_floating_point() or parameter.numel() == 0:
            continue
        few = parameter.detach().flatten()[:PATTERN]
        mean = few.mean()
        spread = float(few.std(correction=0) + 0.2 * mean.abs() + 0.02)
        if parameter.dim() > 1:
            spread = max(spread, (max(parameter.shape) / parameter.numel()) ** 0.5)
        noise = torch.rand(min(parameter.numel(), PATTERN), generator=generator, dtype=torch.float32)
        noise = noise.sub_(0.5).mul_(12**0.5).repeat(-(-parameter.numel() // PATTERN))[: parameter.numel()]
        parameter.copy_(noise.view(parameter.shape)).mul_(spread).add_(mean)
        if name in louder:
            parameter.mul_(gain)


def relative_difference(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    """``max |a - b| / max |b|`` over corresponding tensors; infinite where shapes or finiteness differ, or where nothing is finite
    (then nothing can be told)."""
    if len(a) != len(b):
        return float("inf")
    worst = 0.0
    for x, y in zip(a, b, strict=True):
        if x.shape != y.shape or not torch.equal(torch.isfinite(x), torch.isfinite(y)):
            return float("inf")
        finite = torch.isfinite(y)
        if bool(finite.any()):
            scale = float(y[finite].abs().max()) or 1.0
            worst = max(worst, float((x[finite] - y[finite]).abs().max()) / scale)
        elif y.numel():
            return float("inf")
    return worst
