"""The hot loops: C++ (``csrc/``: AVX-512, AVX2, scalar; chosen by the processor at run time), each beside its
torch reference.

Every function checks its arguments, takes the extension where it is there and tensors are on the CPU, and the reference
elsewhere. `backend` tells which; ``DITHER_KERNELS`` and ``DITHER_ISA`` choose by hand (see `dither.kernels.extension`).
"""

from __future__ import annotations

from dither.kernels.attention import causal_attention
from dither.kernels.caches import cache_bytes
from dither.kernels.codebook import decode_codebook, nearest_centroids, sweep_columns
from dither.kernels.codebook_matmul import CodebookMatrix
from dither.kernels.dequantize import dequantize_affine
from dither.kernels.extension import backend
from dither.kernels.fwht import fwht_rows
from dither.kernels.gptq import ColumnFormat, gptq_columns, gptq_columns_dynamic
from dither.kernels.gram import gram_finish, gram_update
from dither.kernels.grids import AffineGrid, ColumnGrid, MixedGrid, OffsetGrid, TableGrid
from dither.kernels.hadamard import hadamard_rows
from dither.kernels.int8_matmul import MOST_COLUMNS, Int8Matrix, TokenGrid, int8_matmul
from dither.kernels.packed_matmul import PackedMatrix, packed_matmul
from dither.kernels.packing import pack_rows, packed_stride, unpack_rows
from dither.kernels.partial import dequantize_partial, places_to_bitmap
from dither.kernels.partial_matmul import PartialMatrix
from dither.kernels.round import round_affine, round_to_one_grid
from dither.kernels.softmax import (
    SOFTMAX_ALGORITHMS,
    log_softmax_rows,
    logsumexp_rows,
    softmax_algorithm,
    softmax_gradient_rows,
    softmax_rows,
)
from dither.kernels.wide import pack_wide, unpack_wide

__all__ = [
    "MOST_COLUMNS", "SOFTMAX_ALGORITHMS",
    "AffineGrid", "CodebookMatrix", "ColumnFormat", "ColumnGrid", "Int8Matrix", "MixedGrid", "OffsetGrid", "PackedMatrix", "PartialMatrix",
    "TableGrid", "TokenGrid",
    "backend", "cache_bytes", "causal_attention",
    "decode_codebook",
    "dequantize_affine", "dequantize_partial",
    "fwht_rows", "gptq_columns", "gptq_columns_dynamic", "gram_finish", "gram_update", "hadamard_rows", "int8_matmul",
    "log_softmax_rows", "logsumexp_rows",
    "nearest_centroids",
    "pack_rows", "pack_wide", "packed_matmul", "packed_stride",
    "places_to_bitmap",
    "round_affine", "round_to_one_grid", "softmax_algorithm", "softmax_gradient_rows", "softmax_rows", "sweep_columns", "unpack_rows", "unpack_wide",
]
