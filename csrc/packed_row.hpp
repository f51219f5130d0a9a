// Products of one or a few rows x with many rows of a packed matrix, several of them at a time: what packed_matmul.hpp computes, to the last bit, in less
// time where rows are short, as in small models. x is prepared as `PackedKernel` has it.
#pragma once

#include "packed_matmul.hpp"

namespace dither {

using PackedRow = void (*)(const PackedMatmul&, int64_t first, int64_t last);  // of y [T, O]

#ifdef DITHER_X86
PackedRow packed_row_avx512bf16(const PackedMatmul&);  // for the kernel of that name; nullptr where there is none for such a matrix
#endif

}  // namespace dither
