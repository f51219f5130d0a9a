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
    friend F32 operator+(F32 a, F32 b) { return {_mm512_add_ps(a.v, b.v)}; }
    friend F32 operator-(F32 a, F32 b) { return {_mm512_sub_ps(a.v, b.v)}; }
    friend F32 operator*(F32 a, F32 b) { return {_mm512_mul_ps(a.v, b.v)}; }
    friend F32 operator/(F32 a, F32 b) { return {_mm512_div_ps(a.v, b.v)}; }
    static F32 fnmadd(F32 a, F32 b, F32 c) { return {_mm512_fnmadd_ps(a.v, b.v, c.v)}; }  // c - a b, one rounding
    static F32 fmadd(F32 a, F32 b, F32 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
    static F32 round(F32 a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
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
    friend F64 operator+(F64 a, F64 b) { return {_mm512_add_pd(a.v, b.v)}; }
    friend F64 operator-(F64 a, F64 b) { return {_mm512_sub_pd(a.v, b.v)}; }
    friend F64 operator*(F64 a, F64 b) { return {_mm512_mul_pd(a.v, b.v)}; }
    friend F64 operator/(F64 a, F64 b) { return {_mm512_div_pd(a.v, b.v)}; }
    static F64 fnmadd(F64 a, F64 b, F64 c) { return {_mm512_fnmadd_pd(a.v, b.v, c.v)}; }
    static F64 fmadd(F64 a, F64 b, F64 c) { return {_mm512_fmadd_pd(a.v, b.v, c.v)}; }
    static F64 round(F64 a) { return {_mm512_roundscale_pd(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
    static F64 clamp(F64 a, F64 lo, F64 hi) { return {_mm512_min_pd(_mm512_max_pd(a.v, lo.v), hi.v)}; }
    static F64 add_where_ge(F64 sum, F64 a, F64 edge) {
        return {_mm512_mask_add_pd(sum.v, _mm512_cmp_pd_mask(a.v, edge.v, _CMP_GE_OQ), sum.v, _mm512_set1_pd(1.0))};
    }
    void store_codes(uint8_t* p) const {
        _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm256_cvtepi32_epi8(_mm512_cvtpd_epi32(v)));
    }
};

}  // namespace
