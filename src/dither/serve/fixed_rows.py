"""Float layers see the same number of rows whatever the load, so that a row's products do not depend on what is beside it.

    y = layer([x; 0])[:n],   [x; 0] of FEW_ROWS rows

A matrix product's order of sums depends on its shape: libraries choose another loop for one row than for eight. With few-bit layers that multiply
codes (`kernels.packed_matmul`) each row's sum is its own already.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle
from transformers.pytorch_utils import Conv1D

from dither.quant.cpu_products import FEW_ROWS
from dither.quant.linear import QuantLinear, SharedLinear


def fix_rows(model: nn.Module) -> list[RemovableHandle]:
    """Give every linear layer of ``model`` that multiplies decoded or float weights at least `FEW_ROWS` rows, once. ``remove()`` of what it
    returns undoes it."""
    handles: list[RemovableHandle] = []
    for module in model.modules():
        if _fill in module._forward_pre_hooks.values():
            continue
        stored = module.embedding if isinstance(module, SharedLinear) else module if isinstance(module, QuantLinear) else None
        if isinstance(module, nn.Linear | Conv1D) or (stored is not None and not stored.multiplies_codes):
            handles += [module.register_forward_pre_hook(_fill), module.register_forward_hook(_cut)]
    return handles


def _fill(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """``[1, n, I]`` or ``[n, I]`` of few rows -> ``[..., FEW_ROWS, I]``."""
    module._rows_of_few = None  # type: ignore[assignment]
    x: Tensor = args[0]
    few = x.shape[-2] if x.dim() > 1 else 0
    if not 0 < few < FEW_ROWS or few * x.shape[-1] != x.numel():
        return None
    module._rows_of_few = few  # type: ignore[assignment]
    return (F.pad(x, (0, 0, 0, FEW_ROWS - few)), *args[1:])


def _cut(module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
    few: Any = module._rows_of_few
    return None if few is None else output[..., :few, :]
