// Tables of what codes mean, of 32 bfloat16 each. Include only in files compiled for AVX-512.
#pragma once

#include <immintrin.h>

#include "packed_weights.hpp"

namespace {

// Lane l: what (first + l) & mask means, less `early_zero`; bfloat16 holds that (`fits_bfloat16`).
inline __m512i meanings(const dither::PackedWeights& w, int first, int mask) {
    const __m512 zero = _mm512_set1_ps(early_zero(w));
    const auto half = [&](int from) {
        const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        const __m512i code = _mm512_and_si512(_mm512_add_epi32(lanes, _mm512_set1_epi32(from)), _mm512_set1_epi32(mask));
        const __m512 value = w.values ? _mm512_i32gather_ps(code, w.values, 4) : _mm512_cvtepi32_ps(code);
        return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_castps_si512(_mm512_sub_ps(value, zero)), 16));
    };
    return _mm512_inserti64x4(_mm512_castsi256_si512(half(first)), half(first + 16), 1);
}

// Lane l: 16 (l & 15), what the upper half of 8 bits adds to a whole number.
inline __m512i upper_halves() {
    const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i value = _mm512_castps_si512(_mm512_cvtepi32_ps(_mm512_slli_epi32(lanes, 4)));
    return _mm512_broadcast_i64x4(_mm512_cvtepi32_epi16(_mm512_srli_epi32(value, 16)));
}

}  // namespace
