"""Few-bit inputs: how the rows that a layer multiplies are rounded at run time.

    dynamic    parameters are made anew for each row (``token``, ``group(n)``) or tensor, from its own values; nothing is stored
    static     parameters were fitted on calibration data; they are stored, and larger values are clipped

``shift [I]``: powers of two that lift small channels into the grid before rounding and take them back after it (LLM-FP4's pre-shifted
exponent bias; exact in every float format, and part of the weights where a producer can absorb it).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dither.errors import CheckpointError
from dither.formats import Params, Scheme
from dither.kernels.checks import check_finite


@dataclass(frozen=True)
class InputQuant:
    """``scheme`` on matrices ``[T, I]``; ``params`` (float32, shaped ``scheme.blocks.grid_shape``) make it static; ``shift [I]`` int8."""

    scheme: Scheme
    params: Params | None = None
    shift: Tensor | None = None

    def module(self) -> InputRounding:
        return InputRounding(self.scheme, self.params, self.shift)

    def to_json(self) -> dict[str, Any]:
        sizes = {k: list(v.shape) for k, v in (self.params or {}).items()}
        return {"scheme": self.scheme.to_json(), "params": sizes, "shift": None if self.shift is None else self.shift.numel()}

    def tensors(self) -> dict[str, Tensor]:
        """What is stored, in memory of its own: layers may share one record."""
        found = {k: v.to(torch.float32, copy=True) for k, v in (self.params or {}).items()}
        return found if self.shift is None else found | {"shift": self.shift.clone()}


def round_rows(x: Tensor, scheme: Scheme, params: Params | None = None, shift: Tensor | None = None) -> Tensor:
    """``x [..., I]`` rounded row by row, in its own type; computed in float32 (float64 for float64).

    Without ``params`` a scheme that has a scale for the whole tensor (NVFP4) gets one for each row, so that what becomes of a token does not
    depend on the tokens beside it. Raises ValueError for NaN and inf.
    """
    rows = x.reshape(-1, x.shape[-1])
    if rows.dtype not in (torch.float32, torch.float64):
        rows = rows.float()
    try:
        if shift is None:
            rows = _rounded(rows, scheme, params)
        else:
            rows = torch.ldexp(rows, shift.to(torch.int32))
            rows = torch.ldexp(_rounded(rows, scheme, params), -shift.to(torch.int32))
    except ValueError:
        if not bool(torch.isfinite(x).all()):
            raise not_finite(scheme) from None
        raise
    return rows.reshape(x.shape).to(x.dtype)


def not_finite(scheme: Scheme) -> ValueError:
    """What is raised for NaN and inf, also by kernels that round rows themselves."""
    return ValueError(f"inputs: rows that are to be rounded to {scheme} hold NaN or inf")


def _rounded(rows: Tensor, scheme: Scheme, params: Params | None) -> Tensor:
    """``rows [T, I]`` float32 or float64."""
    if params is not None or scheme.blocks.height != 1:
        return scheme.quantize(rows, params)
    if not scheme.tensor_scale:
        return _by_blocks(rows, scheme)
    peak = rows.abs().amax(1, keepdim=True)  # where all rows have one peak, they come to one scale of the whole tensor
    peak = torch.where(peak > 0, peak, torch.ones_like(peak))
    return _by_blocks(rows / peak, scheme) * peak


def _by_blocks(rows: Tensor, scheme: Scheme) -> Tensor:
    """What `Scheme.quantize` gives; where all blocks are of one size, in half of its calls."""
    width = scheme.blocks.columns(rows.shape[1])
    if scheme.clip is not None or rows.shape[1] % width or scheme.fits_in_one_pass(rows):
        return scheme.quantize(rows)
    check_finite("inputs", rows)
    blocks = rows.reshape(rows.shape[0], rows.shape[1] // width, width)  # (T, G, n)
    return scheme.format.quantize(blocks, scheme.format.fit(blocks)).reshape(rows.shape)


class InputRounding(nn.Module):
    """`round_rows` as a module, whose buffers are the stored tensors."""

    def __init__(self, scheme: Scheme, params: Params | None = None, shift: Tensor | None = None) -> None:
        super().__init__()
        self.scheme, self.names = scheme, tuple(params or {})
        for name, value in (params or {}).items():
            self.register_buffer(name, value.to(torch.float32))
        self.shift: Tensor | None
        self.register_buffer("shift", None if shift is None else shift.to(torch.int8))

    @classmethod
    def from_json(cls, data: dict[str, Any], device: str = "meta") -> InputRounding:
        """Without values. Raises ValueError, KeyError, TypeError where the record makes no sense."""
        scheme = Scheme.from_json(data["scheme"])
        known = {*scheme.format.param_bits(), *(("global_scale",) if scheme.tensor_scale else ())}
        if data["params"] and set(data["params"]) != known:
            raise ValueError(f"inputs: {scheme} has the parameters {sorted(known)}, not {sorted(data['params'])}")
        params = {str(k): torch.zeros([int(n) for n in v], device=device) for k, v in data["params"].items()}
        shift = data["shift"]
        return cls(scheme, params, None if shift is None else torch.zeros(int(shift), dtype=torch.int8, device=device))

    def forward(self, x: Tensor) -> Tensor:
        params = {name: self.get_buffer(name) for name in self.names} or None
        return round_rows(x, self.scheme, params, self.shift)

    def check(self) -> None:
        """Raises CheckpointError where a stored value is not finite."""
        for name in self.names:
            if not bool(torch.isfinite(self.get_buffer(name)).all()):
                raise CheckpointError(f"{name}: holds NaN or inf")

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Moves between devices, but keeps the types in which parameters are stored."""
        for name, buffer in list(self.named_buffers(recurse=False)):
            moved = fn(buffer)
            self._buffers[name] = moved if moved.dtype == buffer.dtype else buffer.to(moved.device)
        return self

    def restore_types(self) -> None:
        """Give parameters back the type they are stored in, after a loader that casts whole models."""
        for name in self.names:
            self._buffers[name] = self.get_buffer(name).to(torch.float32)

    def extra_repr(self) -> str:
        return f"{self.scheme}, {'static' if self.names else 'dynamic'}"
