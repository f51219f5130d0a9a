#include "storage_avx2.hpp"
#include "unpack_avx2.hpp"

#include "packed_gemm_panel.hpp"
#include "packed_gemm_tile.hpp"

namespace {

// [16][depth] -> [depth][16], eight by eight
void transpose_panel(const float* rows, int64_t depth, float* panel) {
    for (int64_t k = 0; k < depth; k += 8, panel += 8 * P)
        for (int64_t r = 0; r < P; r += 8) {
            __m256 a[8], b[8];
#pragma GCC unroll 8
            for (int i = 0; i < 8; ++i) a[i] = _mm256_loadu_ps(rows + (r + i) * depth + k);
#pragma GCC unroll 4
            for (int i = 0; i < 8; i += 2) {
                b[i] = _mm256_unpacklo_ps(a[i], a[i + 1]);
                b[i + 1] = _mm256_unpackhi_ps(a[i], a[i + 1]);
            }
#pragma GCC unroll 4
            for (int h = 0; h < 2; ++h)
                for (int i = 0; i < 8; i += 4) {  // lanes 2 h, 2 h + 1 of each half, rows i .. i + 3
                    a[i + 2 * h] = _mm256_shuffle_ps(b[i + h], b[i + 2 + h], 0x44);
                    a[i + 2 * h + 1] = _mm256_shuffle_ps(b[i + h], b[i + 2 + h], 0xee);
                }
#pragma GCC unroll 4
            for (int j = 0; j < 4; ++j) {
                _mm256_storeu_ps(panel + j * P + r, _mm256_permute2f128_ps(a[j], a[4 + j], 0x20));
                _mm256_storeu_ps(panel + (4 + j) * P + r, _mm256_permute2f128_ps(a[j], a[4 + j], 0x31));
            }
        }
}

}  // namespace

namespace dither {

GemmKernel gemm_kernel_avx2(const PackedWeights& w) {
    const GemmDecode named = w.bits <= 4 ? decode_panel<Unpack<Near>, float, transpose_panel> : decode_panel<Unpack<Far>, float, transpose_panel>;
    return {1, 1, w.values ? named : decode_panel<Unpack<Whole>, float, transpose_panel>, tile<F32, 6, 1>, finish};  // 12 sums of 16 registers
}

}  // namespace dither
