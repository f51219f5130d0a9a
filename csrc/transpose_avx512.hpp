// Sixteen rows of lanes of 32 bits to a panel: [16][depth] -> [depth][16], depth a multiple of 16. Include only in files compiled for AVX-512.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace {

inline void transpose_panel(const float* rows, int64_t depth, float* panel) {
    for (int64_t k = 0; k < depth; k += 16, panel += 256) {
        __m512 a[16], b[16];
#pragma GCC unroll 16
        for (int r = 0; r < 16; ++r) a[r] = _mm512_loadu_ps(rows + r * depth + k);
        // within fours of rows and of lanes, twice; then whole fours change places, twice
#pragma GCC unroll 8
        for (int r = 0; r < 16; r += 2) {
            b[r] = _mm512_unpacklo_ps(a[r], a[r + 1]);
            b[r + 1] = _mm512_unpackhi_ps(a[r], a[r + 1]);
        }
#pragma GCC unroll 4
        for (int r = 0; r < 16; r += 4)
#pragma GCC unroll 2
            for (int h = 0; h < 2; ++h) {  // lane 4 q + 2 h + {0, 1} of rows r .. r + 3, in quarter q
                const __m512d low = _mm512_castps_pd(b[r + h]), high = _mm512_castps_pd(b[r + 2 + h]);
                a[r + 2 * h] = _mm512_castpd_ps(_mm512_unpacklo_pd(low, high));
                a[r + 2 * h + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low, high));
            }
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) {
            const __m512 even0 = _mm512_shuffle_f32x4(a[j], a[4 + j], 0x88), odd0 = _mm512_shuffle_f32x4(a[j], a[4 + j], 0xdd);
            const __m512 even1 = _mm512_shuffle_f32x4(a[8 + j], a[12 + j], 0x88), odd1 = _mm512_shuffle_f32x4(a[8 + j], a[12 + j], 0xdd);
            _mm512_storeu_ps(panel + (j)*16, _mm512_shuffle_f32x4(even0, even1, 0x88));
            _mm512_storeu_ps(panel + (4 + j) * 16, _mm512_shuffle_f32x4(odd0, odd1, 0x88));
            _mm512_storeu_ps(panel + (8 + j) * 16, _mm512_shuffle_f32x4(even0, even1, 0xdd));
            _mm512_storeu_ps(panel + (12 + j) * 16, _mm512_shuffle_f32x4(odd0, odd1, 0xdd));
        }
    }
}

}  // namespace
