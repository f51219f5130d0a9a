"""The hot loops: C++ (``csrc/``: AVX-512, AVX2, scalar; chosen by the processor at run time), each beside its
torch reference.

Every function checks its arguments, takes the extension where it is there and tensors are on the CPU, and the reference
elsewhere. `backend` tells which; ``DITHER_KERNELS`` and ``DITHER_ISA`` choose by hand (see `dither.kernels.extension`).
"""

from __future__ import annotations

from dither.kernels.dequantize import dequantize_affine
from dither.kernels.extension import backend
from dither.kernels.gptq import ColumnFormat, gptq_columns, gptq_columns_dynamic
from dither.kernels.gram import gram_finish, gram_update
from dither.kernels.grids import AffineGrid, ColumnGrid, OffsetGrid, TableGrid
from dither.kernels.packing import pack_rows, packed_stride, unpack_rows

__all__ = [
    "AffineGrid", "ColumnFormat", "ColumnGrid", "OffsetGrid", "TableGrid", "backend", "dequantize_affine",
    "gptq_columns", "gptq_columns_dynamic", "gram_finish", "gram_update", "pack_rows", "packed_stride", "unpack_rows",
]
