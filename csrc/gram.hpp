// H += X^T X for H float64 [I, I] (upper triangle only) and X float32 or bfloat16 [T, I].
//
// Rows come in chunks of at most `chunk`: products are summed in float32 within a chunk, in float64 across chunks. A chunk is packed
// into panels of 16 columns, [I / 16][chunk][16], so that a tile of H (some rows of one panel times some whole panels) streams
// through contiguous memory with its sums in registers. By symmetry only tiles that touch the upper triangle are computed:
// T I^2 / 2 multiply-adds. With AVX512_BF16, two rows of bfloat16 share a lane and vdpbf16ps sums both products.
#pragma once

#include <cstdint>

#include "cpu.hpp"

namespace dither {

inline constexpr int64_t panel_columns = 16;

struct GramKernel {
    int64_t tile_rows;    // divides 16
    int64_t tile_panels;  // at most so many panels in one tile
    int64_t row_pair;     // rows of X that share one packed lane: 1 or 2
    // Packs `depth` rows of columns [c, c + 16) of X (row stride I); columns beyond I and a missing second row become zero.
    void (*pack)(const void* x, int64_t depth, int64_t columns, int64_t c, float* to);
    // h[m, j] += sum_k a[16 k + m] b_panel[16 k + j % 16], m < rows, j < cols
    void (*tile)(const float* a, const float* b, int64_t panel_stride, int64_t depth, double* h, int64_t ld, int64_t rows, int64_t cols);
};

enum class RowType { float32, bfloat16 };

GramKernel gram_kernel_scalar(RowType);
#ifdef DITHER_X86
GramKernel gram_kernel_avx2(RowType);
GramKernel gram_kernel_avx512(RowType);
GramKernel gram_kernel_avx512bf16();
#endif

void gram_update(double* hessian, const void* x, RowType type, int64_t rows, int64_t columns, Isa isa, int threads);

// Copies the upper triangle onto the lower one.
void gram_mirror(double* hessian, int64_t columns, int threads);

}  // namespace dither
