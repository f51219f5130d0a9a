"""What a kernel may assume of its arguments is checked here: C++ trusts shapes, dtypes, strides and indices."""

from __future__ import annotations

import torch
from torch import Tensor


def check(name: str, x: Tensor, shape: tuple[int | None, ...], dtypes: tuple[torch.dtype, ...]) -> None:
    """Raises TypeError or ValueError unless ``x`` is a dense tensor of ``shape`` (None: any size) and one of
    ``dtypes``.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: must be a tensor, not {type(x).__name__}")
    if x.dtype not in dtypes:
        raise ValueError(f"{name}: dtype {_short(x.dtype)}, must be {' or '.join(map(_short, dtypes))}")
    if x.dim() != len(shape) or any(n is not None and n != m for n, m in zip(shape, x.shape, strict=True)):
        wanted = ", ".join("any" if n is None else str(n) for n in shape)
        raise ValueError(f"{name}: shape {list(x.shape)}, must be [{wanted}]")
    if x.layout != torch.strided:
        raise ValueError(f"{name}: must be a dense tensor, not {x.layout}")
    if not x.is_contiguous():
        raise ValueError(f"{name}: must be contiguous, its strides are {list(x.stride())}")


def check_range(name: str, x: Tensor, low: int, high: int) -> None:
    """Raises ValueError unless every entry of the integer tensor ``x`` lies in ``[low, high]``."""
    if x.numel() and (int(x.min()) < low or int(x.max()) > high):
        raise ValueError(f"{name}: holds {int(x.min())} .. {int(x.max())}, must be within {low} .. {high}")


def check_finite(name: str, x: Tensor) -> None:
    """Raises ValueError, naming the first place, if the matrix ``x`` holds NaN or inf."""
    if x.numel() == 0:
        return
    low, high = x.aminmax()  # NaN propagates into both; much faster than isfinite
    if not bool(torch.isfinite(low) & torch.isfinite(high)):
        row, column = (int(i) for i in (~torch.isfinite(x)).nonzero()[0])
        raise ValueError(f"{name}: holds {float(x[row, column])} at row {row}, column {column}")


def check_bits(bits: int) -> None:
    if not 1 <= bits <= 8:
        raise ValueError(f"bits: must be 1 .. 8, not {bits}")


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
