"""Products of a few rows with weights stored as indices of vectors (`kernels.decode_codebook`), which are not decoded to memory.

    y[t, r v .. r v + v - 1] = sum_j x[t, j] scale_j (C[code_rj] + R[code'_rj])  +  sum_j x[t, j] bias_j

An index costs the reading of an entry of the book (two, with residuals) and a multiply-add of v numbers for each row of x: O I multiply-adds a row of
x, in O I / v vectors. The other way, to gather for each entry the inputs that name it, takes O I / v additions and O k multiply-adds, but those
additions go through memory one by one: it was left out (csrc/codebook_matmul.hpp has the count). All in float32, sums in blocks of 256 columns.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from dither.kernels.checks import check
from dither.kernels.codebook import check_book
from dither.kernels.codebook_matmul_reference import codebook_matmul_reference
from dither.kernels.extension import extension, isa, threads


class CodebookMatrix:
    """The weights ``[rows, columns]``, in the parts that `kernels.decode_codebook` takes and explains. ``beside``: a matrix of the same size whose
    products are added, such as that of the columns with a book of their own. Books are copied, entries padded to 4, 8 or a multiple of 16 numbers;
    codes are not. ValueError for parts that do not fit one another."""

    def __init__(
        self, packed: Tensor, bits: int, centroids: Tensor, residuals: Tensor | None = None, *, rows: int, columns: int, count: int,
        group: Tensor | None = None, place: Tensor | None = None, affine: tuple[Tensor, Tensor] | None = None, beside: CodebookMatrix | None = None,
    ) -> None:
        check_book(packed, bits, centroids, residuals, rows=rows, columns=columns, count=count, group=group, place=place, affine=affine)
        if beside is not None and (beside.rows, beside.columns) != (rows, columns):
            raise ValueError(f"beside: is [{beside.rows}, {beside.columns}], must be [{rows}, {columns}]")
        size, v = centroids.shape[1:]
        width = 4 if v <= 4 else -(-v // 8) * 8 if v <= 8 else -(-v // 16) * 16
        self.rows: int = rows
        self.columns: int = columns
        self.count, self.vector, self.bits, self.beside = count, int(v), bits, beside
        self.packed, self.group, self.place, self.affine = packed, group, place, affine
        self.books = tuple(None if book is None else F.pad(book.detach(), (0, width - v)).contiguous() for book in (centroids, residuals))
        scale, bias = (None, None) if affine is None else affine
        self._weights = (
            rows, columns, count, v, bits, size.bit_length() - 1, packed.data_ptr(), packed.shape[1], width,
            *(0 if part is None else part.data_ptr() for part in (*self.books, group, place, scale, bias)),
        )  # fmt: skip

    def __call__(self, x: Tensor) -> Tensor:
        """``x [T, I]``, dense, float32 or bfloat16 -> ``[T, O]`` in the type of x. ValueError where it is something else, or wants a gradient."""
        check("x", x, (None, self.columns), (torch.float32, torch.bfloat16))
        if x.requires_grad and torch.is_grad_enabled():
            raise ValueError("x: products with stored weights have no gradient; decode the weights first")
        wide, y = x.float(), torch.empty(x.shape[0], self.rows)
        self._multiply(wide, y, add=False)
        if self.beside is not None:
            self.beside._multiply(wide, y, add=True)
        return y.to(x.dtype)

    def _multiply(self, x: Tensor, y: Tensor, *, add: bool) -> None:
        native = extension() if x.device.type == "cpu" else None
        if native is not None:
            native.codebook_matmul(*self._weights, x.data_ptr(), x.shape[0], add, y.data_ptr(), isa(), threads())
            return
        centroids, residuals = (None if book is None else book[..., : self.vector] for book in self.books)
        assert centroids is not None
        found = codebook_matmul_reference(x, self.packed, self.bits, self.count, centroids, residuals, self.group, self.place, self.affine, self.rows)
        y.add_(found) if add else y.copy_(found)
