"""The few-bit products as operations of torch: schemas, traces, compilation and export, refusals, and what they compute on this device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dither.formats import Float, Int, QTensor, Scheme, channel
from dither.kernels.gpu import ops, presence
from kernels.gpu_problems import DEVICE, check, packed_problem


def arguments(name: str) -> tuple[Any, ...]:
    """Of the operation ``name``, for 5 rows of 64 inputs and 24 outputs."""
    if name == "packed_matmul":
        return packed_problem(24, 64, 4, 32, 5, dtype=torch.float32).arguments()
    scheme: Scheme = (Float(4, 3) if name == "float8_matmul" else Int(8)) @ channel()
    g = torch.Generator().manual_seed(3)
    weight, x = torch.randn(24, 64, generator=g), torch.randn(5, 64, generator=g)
    params = scheme.fit(weight)
    held = QTensor.from_codes(scheme.encode(weight, params), params, scheme).tensors()
    rest = [held["codes"], held["scale"], *([] if name == "float8_matmul" else [held["zero_point"]])]
    last: tuple[Any, ...] = (8, 64, 8, "", "float16") if name == "rounded_matmul" else ("float16",)
    return (x.to(DEVICE), *(t.to(DEVICE) for t in rest), *last)


def ready(name: str) -> bool:
    if name == "rounded_matmul":
        return DEVICE == "cpu"
    return DEVICE == "cpu" or (presence.has_triton() and (name != "float8_matmul" or presence.has_float8(torch.device(DEVICE))))


NAMES = pytest.mark.parametrize("name", [n for n in ("packed_matmul", "int8_matmul", "float8_matmul", "rounded_matmul") if ready(n)])


def operation(name: str) -> Any:
    return getattr(torch.ops.dither, name).default


@NAMES
def test_torch_finds_nothing_wrong(name: str) -> None:
    found = torch.library.opcheck(operation(name), arguments(name))
    assert set(found.values()) == {"SUCCESS"}


@NAMES
def test_a_gradient_is_refused_by_name(name: str) -> None:
    x, *rest = arguments(name)
    with pytest.raises(RuntimeError, match=f"dither::{name} has no gradient"):
        operation(name)(x.requires_grad_(), *rest)
    with torch.no_grad():
        assert operation(name)(x, *rest).shape == (5, 24)


@NAMES
def test_shapes_and_types_are_known_without_values(name: str) -> None:
    given = [a.to("meta") if isinstance(a, Tensor) else a for a in arguments(name)]
    found = operation(name)(given[0].bfloat16(), *given[1:])
    assert found.shape == (5, 24) and found.dtype == torch.bfloat16 and found.device.type == "meta"


@NAMES
def test_compiled_whole(name: str) -> None:
    x, *rest = arguments(name)
    seen: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        seen.append(graph)
        return graph.forward

    compiled = torch.compile(lambda x: torch.relu(operation(name)(x, *rest)) + 1, fullgraph=True, backend=keep)
    assert torch.equal(compiled(x), torch.relu(operation(name)(x, *rest)) + 1)
    assert len(seen) == 1 and any(node.target is operation(name) for node in seen[0].graph.nodes)


@NAMES
def test_exported(name: str) -> None:
    x, *rest = arguments(name)

    class Layer(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            found = operation(name)(x, *rest)
            assert isinstance(found, Tensor)
            return found * 2

    program = torch.export.export(Layer(), (x,))
    assert torch.equal(program.module()(x), operation(name)(x, *rest) * 2)


@pytest.mark.slow
@NAMES
def test_compiled_by_inductor(name: str) -> None:
    x, *rest = arguments(name)
    compiled = torch.compile(lambda x: torch.relu(operation(name)(x, *rest)) + 1, fullgraph=True)
    assert torch.equal(compiled(x), torch.relu(operation(name)(x, *rest)) + 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
def test_packed_against_float64(bits: int, symmetric: bool, dtype: torch.dtype) -> None:
    if not ready("packed_matmul"):
        pytest.skip("no triton")
    problem = packed_problem(9, 130, bits, 32, 3, symmetric=symmetric, dtype=dtype)
    check(problem, ops.packed_matmul(*problem.arguments()), weights_rounded=True)


@pytest.mark.skipif(DEVICE == "cuda", reason="the CPU's kernel has every width and group")
def test_the_cpu_takes_what_its_kernel_takes() -> None:
    problem = packed_problem(9, 130, 3, 20, 3, dtype=torch.float32)
    check(problem, ops.packed_matmul(*problem.arguments()), weights_rounded=False)
    assert problem.zero is not None
    with pytest.raises(ValueError, match="zero"):
        ops.packed_matmul(problem.x, problem.packed, problem.scale, problem.zero[:-1], 3, 20)
