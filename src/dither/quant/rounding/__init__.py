"""Roundings: weights + statistics + grid -> `QTensor`."""

from dither.quant.rounding.adaround import UpOrDown
from dither.quant.rounding.columns import Columns, columns, damped_inverse_factor
from dither.quant.rounding.flexround import Division
from dither.quant.rounding.learned import Learned, learned
from dither.quant.rounding.nearest import Nearest, nearest
from dither.quant.rounding.reconstruct import Reconstruct
from dither.quant.rounding.vector_columns import VectorColumns, vector_columns

__all__ = [
    "Columns",
    "Division",
    "Learned",
    "Nearest",
    "Reconstruct",
    "UpOrDown",
    "VectorColumns",
    "columns",
    "damped_inverse_factor",
    "learned",
    "nearest",
    "vector_columns",
]
