// Sixteen int32, or 64 bytes in four blocks of sixteen, for int8_matmul.hpp. Include only in files compiled for AVX512_VNNI.
#pragma once

#include "storage_avx512.hpp"

namespace {

struct Int {
    static constexpr int lanes = 16, blocks = 4;
    __m512i v;

    static Int zero() { return {_mm512_setzero_si512()}; }
    static Int set1(int32_t x) { return {_mm512_set1_epi32(x)}; }
    static Int load(const void* p) { return {_mm512_loadu_si512(p)}; }
    static Int bits(F32 x) { return {_mm512_castps_si512(x.v)}; }
    static Int widened(const uint8_t* p) { return {_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))}; }
    void store(void* p) const { _mm512_storeu_si512(p, v); }
    F32 floats() const { return {_mm512_cvtepi32_ps(v)}; }
    friend Int operator+(Int a, Int b) { return {_mm512_add_epi32(a.v, b.v)}; }
    friend Int operator-(Int a, Int b) { return {_mm512_sub_epi32(a.v, b.v)}; }
    friend Int operator*(Int a, Int b) { return {_mm512_mullo_epi32(a.v, b.v)}; }

    // numbers of 16 bits in pairs: of the low halves of two, and sum + low low + high high, exactly
    static Int pair(Int low, Int high) { return {_mm512_mask_mov_epi16(low.v, 0xaaaaaaaa, _mm512_slli_epi32(high.v, 16))}; }
    static Int add_pairs(Int sum, Int a, Int b) { return {_mm512_dpwssd_epi32(sum.v, a.v, b.v)}; }

    // lane i of every block becomes the sum of r[i]'s lanes there
    static Int sum4(const Int (&r)[4]) {
        const __m512i low = _mm512_add_epi32(_mm512_unpacklo_epi32(r[0].v, r[1].v), _mm512_unpackhi_epi32(r[0].v, r[1].v));
        const __m512i high = _mm512_add_epi32(_mm512_unpacklo_epi32(r[2].v, r[3].v), _mm512_unpackhi_epi32(r[2].v, r[3].v));
        return {_mm512_add_epi32(_mm512_unpacklo_epi64(low, high), _mm512_unpackhi_epi64(low, high))};
    }
    static void transpose_lanes(Int* r) {  // four of them, within every block
        const __m512i a = _mm512_unpacklo_epi32(r[0].v, r[1].v), b = _mm512_unpacklo_epi32(r[2].v, r[3].v);
        const __m512i c = _mm512_unpackhi_epi32(r[0].v, r[1].v), d = _mm512_unpackhi_epi32(r[2].v, r[3].v);
        r[0].v = _mm512_unpacklo_epi64(a, b);
        r[1].v = _mm512_unpackhi_epi64(a, b);
        r[2].v = _mm512_unpacklo_epi64(c, d);
        r[3].v = _mm512_unpackhi_epi64(c, d);
    }
    static void transpose_blocks(Int* r) {  // block k of r[i] and block i of r[k] change places
        const __m512i a = _mm512_shuffle_i32x4(r[0].v, r[1].v, 0x44), b = _mm512_shuffle_i32x4(r[2].v, r[3].v, 0x44);
        const __m512i c = _mm512_shuffle_i32x4(r[0].v, r[1].v, 0xee), d = _mm512_shuffle_i32x4(r[2].v, r[3].v, 0xee);
        r[0].v = _mm512_shuffle_i32x4(a, b, 0x88);
        r[1].v = _mm512_shuffle_i32x4(a, b, 0xdd);
        r[2].v = _mm512_shuffle_i32x4(c, d, 0x88);
        r[3].v = _mm512_shuffle_i32x4(c, d, 0xdd);
    }
};

inline void store_signed(F32 x, int8_t* p) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(x.v))); }

}  // namespace
