// Sixteen codes to float32 or bfloat16: scale (value - zero), rounded once more for bfloat16. Include only in files compiled for AVX-512.
#pragma once

#include "codes_avx512.hpp"

namespace {

// `Meaning` (codes_avx512.hpp): Whole, Near or Far
template <class Meaning>
struct Unpack : Meaning {
    __m512 scale, zero;
    Unpack(int bits, const float* table) : Meaning(bits, table), scale(_mm512_setzero_ps()), zero(_mm512_setzero_ps()) {}

    void group(float s, float z) {
        scale = _mm512_set1_ps(s);
        zero = _mm512_set1_ps(z);
    }
    void from(int lane, float s, float z) {
        const __mmask16 there = static_cast<__mmask16>(0xffffu << lane);
        scale = _mm512_mask_mov_ps(scale, there, _mm512_set1_ps(s));
        zero = _mm512_mask_mov_ps(zero, there, _mm512_set1_ps(z));
    }
    __m512 weights(const uint8_t* source) const { return _mm512_mul_ps(scale, _mm512_sub_ps(Meaning::values(source), zero)); }
    void store(const uint8_t* source, float* to) const { _mm512_storeu_ps(to, weights(source)); }
    void store(const uint8_t* source, uint16_t* to) const {
        const __m512i x = _mm512_castps_si512(weights(source));
        const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(x, 16), _mm512_set1_epi32(1));
        const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(x, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16(rounded));
    }
    template <class T>
    void store_mixed(const uint8_t* source, T* to) const { store(source, to); }
};

}  // namespace
