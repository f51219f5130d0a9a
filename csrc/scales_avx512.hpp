// Scales and zero points of sixteen groups of a row of packed weights at a time. Include only in files compiled for AVX-512.
#pragma once

#include <immintrin.h>

#include "packed_weights.hpp"

namespace {

inline __mmask16 first_of(int64_t count) { return static_cast<__mmask16>(count >= 16 ? 0xffff : (1u << count) - 1); }

// A byte each: the exponent, or sign, exponent and mantissa put where float32 has them, 120 powers of two too low; subnormals come out right. Lanes that
// are not `there` become zero: subnormal numbers in them would take their time.
inline __m512 widened(__m128i bytes, dither::ScaleStorage type, __mmask16 there) {
    const __m512i b = _mm512_cvtepu8_epi32(bytes);
    if (type == dither::ScaleStorage::e8m0)
        return _mm512_castsi512_ps(_mm512_maskz_max_epu32(there, _mm512_slli_epi32(b, 23), _mm512_set1_epi32(0x00400000)));  // 2^-127 is subnormal
    const __m512i sign = _mm512_slli_epi32(_mm512_and_si512(b, _mm512_set1_epi32(0x80)), 24);
    const __m512i rest = _mm512_slli_epi32(_mm512_and_si512(b, _mm512_set1_epi32(0x7f)), 20);
    return _mm512_mul_ps(_mm512_castsi512_ps(_mm512_or_si512(sign, rest)), _mm512_set1_ps(0x1p120f));
}

// Of row `row` from `group` on, zeros behind the last.
inline __m512 scales_from(const dither::PackedWeights& w, int64_t row, int64_t group) {
    const __mmask16 some = first_of(w.groups - group);
    const int64_t at = row * w.groups + group;
    const uint16_t* const narrow = static_cast<const uint16_t*>(w.scale) + at;
    __m512 s;
    switch (w.scale_type) {
        case dither::ScaleStorage::float32: s = _mm512_maskz_loadu_ps(some, static_cast<const float*>(w.scale) + at); break;
        case dither::ScaleStorage::float16: s = _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(some, narrow)); break;
        case dither::ScaleStorage::bfloat16:
            s = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(some, narrow)), 16));
            break;
        default: s = widened(_mm_maskz_loadu_epi8(some, static_cast<const uint8_t*>(w.scale) + at), w.scale_type, some);
    }
    return _mm512_mul_ps(s, _mm512_set1_ps(w.tensor_scale));
}

// total - scale zero sum x, of row `row` from `group` on. `sums`: of x over each group; scales behind the last group are zero.
inline __m512 without_zeros(const dither::PackedWeights& w, int64_t row, int64_t group, __m512 scale, const float* sums, __m512 total) {
    const __mmask16 some = first_of(w.groups - group);
    const __m512 zero = w.zero ? _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(some, w.zero + row * w.groups + group)))
                               : _mm512_set1_ps(w.middle);
    return _mm512_fnmadd_ps(_mm512_mul_ps(scale, zero), _mm512_maskz_loadu_ps(some, sums + group), total);
}

}  // namespace
