// y[t, o] = sum_i W[o, i] x[t, i] for many rows of x, as when a model reads a prompt: the operation of packed_matmul.hpp where arithmetic, not the reading
// of weights, is what takes time. W is never written out: a thread decodes a few panels of it at a time, which stay in its first cache while all rows of
// x pass by. Sums are float32.
//
// Everything is counted in lanes of 32 bits along i: one float32, or two bfloat16 (vdpbf16ps). A block is a range of lanes that all rows go through before
// the next: products are summed within a block, then added to what other blocks gave, so the order of a row's sums depends on I and the caches alone.
//     x, once a call, shared:   [block][t][lane]
//     W, a few panels:          [panel][lane][16 rows o]
//     y, a thread's own part:   [t][o] float32
#pragma once

#include <cstdint>

#include "cpu.hpp"
#include "packed_weights.hpp"

namespace dither {

inline constexpr int64_t gemm_panel = 16;  // rows of W side by side: one vector of AVX-512

// Of bfloat16, the best that the processor has, or, for tests on processors that have better: float32 products, vdpbf16ps without VBMI and AMX, or AMX as
// it is emulated.
enum class GemmWay { best, widened, pairs, emulated };

struct PackedGemm : PackedWeights {
    int64_t tokens;   // T
    const void* x;    // [T, I], a row `x_next` numbers behind another
    void* y;          // [T, O], a row `y_next` numbers behind another
    int64_t x_next, y_next;
    bool bfloat16;    // x and y; else float32
    int64_t l1, l2;   // bytes of a core's caches
    GemmWay way;
};

// Rows [o, o + 16) of W, lanes [first, first + depth), to a panel; zeros beyond W. `rows` [16, depth]: room.
using GemmDecode = void (*)(const PackedWeights&, int64_t o, int64_t first, int64_t depth, float* rows, float* panel);

// sums [t, next] of a tile's `count` panels, written, or added to where there are earlier blocks. x [tokens, depth].
using GemmTile = void (*)(const float* x, int64_t tokens, const float* panels, int64_t count, int64_t depth, float* sums, int64_t next, bool earlier);

struct GemmKernel {
    int64_t columns_a_lane;  // of W and x: 1, or 2 where products are of bfloat16
    int64_t tile_panels;     // as many as are decoded and multiplied at a time
    GemmDecode decode;
    GemmTile tile;
    void (*finish)(const float* sums, int64_t count, void* y, bool bfloat16);  // to the type of y
};

GemmKernel gemm_kernel_scalar();
GemmKernel gemm_kernel_emulated();  // that of AMX without it, for tests; bfloat16 alone
#ifdef DITHER_X86
GemmKernel gemm_kernel_avx2(const PackedWeights&);
GemmKernel gemm_kernel_avx512(const PackedWeights&);
GemmKernel gemm_kernel_avx512bf16(const PackedWeights&);
GemmDecode gemm_decode_avx512vbmi(const PackedWeights&);  // faster than that of the kernel above, to the same panels; nullptr where there is none
GemmTile gemm_tile_amx();                      // likewise, where the processor has AMX
#endif

void packed_gemm(const PackedGemm&, Isa isa, int threads);

}  // namespace dither
