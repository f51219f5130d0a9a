// AVX-512 (F, BW, DQ, VL): 16 floats or 8 doubles. Include only in files compiled with these instructions.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace {

struct F32 {
    using Real = float;
    static constexpr int lanes = 16;
    static constexpr int panel = 12;  // 2 x 12 accumulators of 32 registers
    __m512 v;

    static F32 load(const float* p) { return {_mm512_loadu_ps(p)}; }
    static F32 set1(float x) { return {_mm512_set1_ps(x)}; }
    void store(float* p) const { _mm512_storeu_ps(p, v); }
    void stream(float* p) const { _mm512_stream_ps(p, v); }  // past the caches, to a whole line; aligned
    static void fence() { _mm_sfence(); }                    // what was streamed is seen by others
    friend F32 operator+(F32 a, F32 b) { return {_mm512_add_ps(a.v, b.v)}; }
    friend F32 operator-(F32 a, F32 b) { return {_mm512_sub_ps(a.v, b.v)}; }
    friend F32 operator*(F32 a, F32 b) { return {_mm512_mul_ps(a.v, b.v)}; }
    friend F32 operator/(F32 a, F32 b) { return {_mm512_div_ps(a.v, b.v)}; }
    static F32 fnmadd(F32 a, F32 b, F32 c) { return {_mm512_fnmadd_ps(a.v, b.v, c.v)}; }  // c - a b, one rounding
    static F32 fmadd(F32 a, F32 b, F32 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
    static F32 round(F32 a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
    static F32 min(F32 a, F32 b) { return {_mm512_min_ps(a.v, b.v)}; }
    static F32 max(F32 a, F32 b) { return {_mm512_max_ps(a.v, b.v)}; }
    float least() const { return _mm512_reduce_min_ps(v); }
    float greatest() const { return _mm512_reduce_max_ps(v); }
    static F32 power_of_two(F32 a) {  // the largest one up to a, for normal a > 0
        return {_mm512_and_ps(a.v, _mm512_castsi512_ps(_mm512_set1_epi32(0x7f800000)))};
    }
    template <int distance>
    static F32 exchange(F32 a) {  // lane i gets lane i ^ distance
        if constexpr (distance >= 4) return {_mm512_shuffle_f32x4(a.v, a.v, distance == 4 ? 0xB1 : 0x4E)};
        else return {_mm512_permute_ps(a.v, distance == 1 ? 0xB1 : 0x4E)};
    }
    static F32 select_lt(F32 a, F32 b, F32 x, F32 y) {  // x where a < b, else y
        return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ), y.v, x.v)};
    }
    static F32 clamp(F32 a, F32 lo, F32 hi) { return {_mm512_min_ps(_mm512_max_ps(a.v, lo.v), hi.v)}; }
    static F32 add_where_ge(F32 sum, F32 a, F32 edge) {
        return {_mm512_mask_add_ps(sum.v, _mm512_cmp_ps_mask(a.v, edge.v, _CMP_GE_OQ), sum.v, _mm512_set1_ps(1.0f))};
    }
    void store_codes(uint8_t* p) const {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(v)));
    }
};

struct F64 {
    using Real = double;
    static constexpr int lanes = 8;
    static constexpr int panel = 12;
    __m512d v;

    static F64 load(const double* p) { return {_mm512_loadu_pd(p)}; }
    static F64 set1(double x) { return {_mm512_set1_pd(x)}; }
    void store(double* p) const { _mm512_storeu_pd(p, v); }
    void stream(double* p) const { _mm512_stream_pd(p, v); }
    static void fence() { _mm_sfence(); }
    friend F64 operator+(F64 a, F64 b) { return {_mm512_add_pd(a.v, b.v)}; }
    friend F64 operator-(F64 a, F64 b) { return {_mm512_sub_pd(a.v, b.v)}; }
    friend F64 operator*(F64 a, F64 b) { return {_mm512_mul_pd(a.v, b.v)}; }
    friend F64 operator/(F64 a, F64 b) { return {_mm512_div_pd(a.v, b.v)}; }
    static F64 fnmadd(F64 a, F64 b, F64 c) { return {_mm512_fnmadd_pd(a.v, b.v, c.v)}; }
    static F64 fmadd(F64 a, F64 b, F64 c) { return {_mm512_fmadd_pd(a.v, b.v, c.v)}; }
    static F64 round(F64 a) { return {_mm512_roundscale_pd(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
    static F64 min(F64 a, F64 b) { return {_mm512_min_pd(a.v, b.v)}; }
    static F64 max(F64 a, F64 b) { return {_mm512_max_pd(a.v, b.v)}; }
    template <int distance>
    static F64 exchange(F64 a) {  // lane i gets lane i ^ distance
        if constexpr (distance == 4) return {_mm512_shuffle_f64x2(a.v, a.v, 0x4E)};
        else if constexpr (distance == 2) return {_mm512_permutex_pd(a.v, 0x4E)};
        else return {_mm512_permute_pd(a.v, 0x55)};
    }
    static F64 select_lt(F64 a, F64 b, F64 x, F64 y) {
        return {_mm512_mask_blend_pd(_mm512_cmp_pd_mask(a.v, b.v, _CMP_LT_OQ), y.v, x.v)};
    }
    static F64 clamp(F64 a, F64 lo, F64 hi) { return {_mm512_min_pd(_mm512_max_pd(a.v, lo.v), hi.v)}; }
    static F64 add_where_ge(F64 sum, F64 a, F64 edge) {
        return {_mm512_mask_add_pd(sum.v, _mm512_cmp_pd_mask(a.v, edge.v, _CMP_GE_OQ), sum.v, _mm512_set1_pd(1.0))};
    }
    void store_codes(uint8_t* p) const {
        _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm256_cvtepi32_epi8(_mm512_cvtpd_epi32(v)));
    }
};

}  // namespace
