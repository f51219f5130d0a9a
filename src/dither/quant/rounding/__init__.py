"""Roundings: weights + statistics + grid -> `QTensor`."""

from dither.quant.rounding.columns import Columns, columns, damped_inverse_factor
from dither.quant.rounding.nearest import Nearest, nearest

__all__ = ["Columns", "Nearest", "columns", "damped_inverse_factor", "nearest"]
