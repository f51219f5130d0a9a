// Eight int32, or 32 bytes in two blocks of sixteen, for int8_matmul.hpp. Include only in files compiled for AVX2 and F16C.
#pragma once

#include "storage_avx2.hpp"

namespace {

struct Int {
    static constexpr int lanes = 8, blocks = 2;
    __m256i v;

    static Int zero() { return {_mm256_setzero_si256()}; }
    static Int set1(int32_t x) { return {_mm256_set1_epi32(x)}; }
    static Int load(const void* p) { return {_mm256_loadu_si256(static_cast<const __m256i*>(p))}; }
    static Int bits(F32 x) { return {_mm256_castps_si256(x.v)}; }
    static Int widened(const uint8_t* p) { return {_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)))}; }
    void store(void* p) const { _mm256_storeu_si256(static_cast<__m256i*>(p), v); }
    F32 floats() const { return {_mm256_cvtepi32_ps(v)}; }
    friend Int operator+(Int a, Int b) { return {_mm256_add_epi32(a.v, b.v)}; }
    friend Int operator-(Int a, Int b) { return {_mm256_sub_epi32(a.v, b.v)}; }
    friend Int operator*(Int a, Int b) { return {_mm256_mullo_epi32(a.v, b.v)}; }

    // numbers of 16 bits in pairs: of the low halves of two, and sum + low low + high high, exactly
    static Int pair(Int low, Int high) { return {_mm256_blend_epi16(low.v, _mm256_slli_epi32(high.v, 16), 0xaa)}; }
    static Int add_pairs(Int sum, Int a, Int b) { return {_mm256_add_epi32(sum.v, _mm256_madd_epi16(a.v, b.v))}; }

    // lane i of every block becomes the sum of r[i]'s lanes there
    static Int sum4(const Int (&r)[4]) {
        const __m256i low = _mm256_add_epi32(_mm256_unpacklo_epi32(r[0].v, r[1].v), _mm256_unpackhi_epi32(r[0].v, r[1].v));
        const __m256i high = _mm256_add_epi32(_mm256_unpacklo_epi32(r[2].v, r[3].v), _mm256_unpackhi_epi32(r[2].v, r[3].v));
        return {_mm256_add_epi32(_mm256_unpacklo_epi64(low, high), _mm256_unpackhi_epi64(low, high))};
    }
    static void transpose_lanes(Int* r) {  // four of them, within every block
        const __m256i a = _mm256_unpacklo_epi32(r[0].v, r[1].v), b = _mm256_unpacklo_epi32(r[2].v, r[3].v);
        const __m256i c = _mm256_unpackhi_epi32(r[0].v, r[1].v), d = _mm256_unpackhi_epi32(r[2].v, r[3].v);
        r[0].v = _mm256_unpacklo_epi64(a, b);
        r[1].v = _mm256_unpackhi_epi64(a, b);
        r[2].v = _mm256_unpacklo_epi64(c, d);
        r[3].v = _mm256_unpackhi_epi64(c, d);
    }
    static void transpose_blocks(Int* r) {  // block k of r[i] and block i of r[k] change places
        const __m256i a = r[0].v, b = r[1].v;
        r[0].v = _mm256_permute2x128_si256(a, b, 0x20);
        r[1].v = _mm256_permute2x128_si256(a, b, 0x31);
    }
};

inline void store_signed(F32 x, int8_t* p) {
    const __m256i whole = _mm256_cvtps_epi32(x.v);
    const __m128i half = _mm_packs_epi32(_mm256_castsi256_si128(whole), _mm256_extracti128_si256(whole, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(half, half));
}

}  // namespace
