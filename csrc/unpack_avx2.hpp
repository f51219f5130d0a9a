// Eight codes to float32 or bfloat16: scale (value - zero), rounded once more for bfloat16. Include only in files compiled for AVX2.
#pragma once

#include "codes_avx2.hpp"

namespace {

// `Meaning` (codes_avx2.hpp): Whole, Near or Far
template <class Meaning>
struct Unpack : Meaning {
    __m256 scale, zero;
    Unpack(int bits, const float* table) : Meaning(bits, table), scale(_mm256_setzero_ps()), zero(_mm256_setzero_ps()) {}

    void group(float s, float z) {
        scale = _mm256_set1_ps(s);
        zero = _mm256_set1_ps(z);
    }
    void from(int lane, float s, float z) {
        const __m256 there = _mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_setr_epi32(1, 2, 3, 4, 5, 6, 7, 8), _mm256_set1_epi32(lane)));
        scale = _mm256_blendv_ps(scale, _mm256_set1_ps(s), there);
        zero = _mm256_blendv_ps(zero, _mm256_set1_ps(z), there);
    }
    __m256 weights(const uint8_t* source) const { return _mm256_mul_ps(scale, _mm256_sub_ps(Meaning::values(source), zero)); }
    void store(const uint8_t* source, float* to) const { _mm256_storeu_ps(to, weights(source)); }
    void store(const uint8_t* source, uint16_t* to) const {
        const __m256i x = _mm256_castps_si256(weights(source));
        const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(x, 16), _mm256_set1_epi32(1));
        const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(x, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
        const __m128i eight = _mm_packus_epi32(_mm256_castsi256_si128(rounded), _mm256_extracti128_si256(rounded, 1));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to), eight);
    }
    template <class T>
    void store_mixed(const uint8_t* source, T* to) const { store(source, to); }
};

}  // namespace
