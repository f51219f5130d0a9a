// AVX2 + FMA: 8 floats or 4 doubles. Include only in files compiled with these instructions.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace {

struct F32 {
    using Real = float;
    static constexpr int lanes = 8;
    static constexpr int panel = 6;  // 2 x 6 accumulators of 16 registers
    __m256 v;

    static F32 load(const float* p) { return {_mm256_loadu_ps(p)}; }
    static F32 set1(float x) { return {_mm256_set1_ps(x)}; }
    void store(float* p) const { _mm256_storeu_ps(p, v); }
    void stream(float* p) const { _mm256_stream_ps(p, v); }  // past the caches, where whole lines are written; aligned
    static void fence() { _mm_sfence(); }                    // what was streamed is seen by others
    friend F32 operator+(F32 a, F32 b) { return {_mm256_add_ps(a.v, b.v)}; }
    friend F32 operator-(F32 a, F32 b) { return {_mm256_sub_ps(a.v, b.v)}; }
    friend F32 operator*(F32 a, F32 b) { return {_mm256_mul_ps(a.v, b.v)}; }
    friend F32 operator/(F32 a, F32 b) { return {_mm256_div_ps(a.v, b.v)}; }
    static F32 fnmadd(F32 a, F32 b, F32 c) { return {_mm256_fnmadd_ps(a.v, b.v, c.v)}; }  // c - a b, one rounding
    static F32 fmadd(F32 a, F32 b, F32 c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
    static F32 round(F32 a) { return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
    static F32 min(F32 a, F32 b) { return {_mm256_min_ps(a.v, b.v)}; }
    static F32 max(F32 a, F32 b) { return {_mm256_max_ps(a.v, b.v)}; }
    float least() const {
        __m128 x = _mm_min_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
        x = _mm_min_ps(x, _mm_movehl_ps(x, x));
        return _mm_cvtss_f32(_mm_min_ss(x, _mm_movehdup_ps(x)));
    }
    float greatest() const {
        __m128 x = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
        x = _mm_max_ps(x, _mm_movehl_ps(x, x));
        return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
    }
    static F32 power_of_two(F32 a) {  // the largest one up to a, for normal a > 0
        return {_mm256_and_ps(a.v, _mm256_castsi256_ps(_mm256_set1_epi32(0x7f800000)))};
    }
    template <int distance>
    static F32 exchange(F32 a) {  // lane i gets lane i ^ distance
        if constexpr (distance == 4) return {_mm256_permute2f128_ps(a.v, a.v, 1)};
        else return {_mm256_permute_ps(a.v, distance == 1 ? 0xB1 : 0x4E)};
    }
    static F32 select_lt(F32 a, F32 b, F32 x, F32 y) {  // x where a < b, else y
        return {_mm256_blendv_ps(y.v, x.v, _mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ))};
    }
    static F32 clamp(F32 a, F32 lo, F32 hi) { return {_mm256_min_ps(_mm256_max_ps(a.v, lo.v), hi.v)}; }
    static F32 add_where_ge(F32 sum, F32 a, F32 edge) {
        return {_mm256_add_ps(sum.v, _mm256_and_ps(_mm256_cmp_ps(a.v, edge.v, _CMP_GE_OQ), _mm256_set1_ps(1.0f)))};
    }
    void store_codes(uint8_t* p) const {
        const __m256i i32 = _mm256_cvtps_epi32(v);
        const __m128i i16 = _mm_packs_epi32(_mm256_castsi256_si128(i32), _mm256_extracti128_si256(i32, 1));
        _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packus_epi16(i16, i16));
    }
};

struct F64 {
    using Real = double;
    static constexpr int lanes = 4;
    static constexpr int panel = 6;
    __m256d v;

    static F64 load(const double* p) { return {_mm256_loadu_pd(p)}; }
    static F64 set1(double x) { return {_mm256_set1_pd(x)}; }
    void store(double* p) const { _mm256_storeu_pd(p, v); }
    void stream(double* p) const { _mm256_stream_pd(p, v); }
    static void fence() { _mm_sfence(); }
    friend F64 operator+(F64 a, F64 b) { return {_mm256_add_pd(a.v, b.v)}; }
    friend F64 operator-(F64 a, F64 b) { return {_mm256_sub_pd(a.v, b.v)}; }
    friend F64 operator*(F64 a, F64 b) { return {_mm256_mul_pd(a.v, b.v)}; }
    friend F64 operator/(F64 a, F64 b) { return {_mm256_div_pd(a.v, b.v)}; }
    static F64 fnmadd(F64 a, F64 b, F64 c) { return {_mm256_fnmadd_pd(a.v, b.v, c.v)}; }
    static F64 fmadd(F64 a, F64 b, F64 c) { return {_mm256_fmadd_pd(a.v, b.v, c.v)}; }
    static F64 round(F64 a) { return {_mm256_round_pd(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
    static F64 min(F64 a, F64 b) { return {_mm256_min_pd(a.v, b.v)}; }
    static F64 max(F64 a, F64 b) { return {_mm256_max_pd(a.v, b.v)}; }
    template <int distance>
    static F64 exchange(F64 a) {  // lane i gets lane i ^ distance
        if constexpr (distance == 2) return {_mm256_permute2f128_pd(a.v, a.v, 1)};
        else return {_mm256_permute_pd(a.v, 0x5)};
    }
    static F64 select_lt(F64 a, F64 b, F64 x, F64 y) {
        return {_mm256_blendv_pd(y.v, x.v, _mm256_cmp_pd(a.v, b.v, _CMP_LT_OQ))};
    }
    static F64 clamp(F64 a, F64 lo, F64 hi) { return {_mm256_min_pd(_mm256_max_pd(a.v, lo.v), hi.v)}; }
    static F64 add_where_ge(F64 sum, F64 a, F64 edge) {
        return {_mm256_add_pd(sum.v, _mm256_and_pd(_mm256_cmp_pd(a.v, edge.v, _CMP_GE_OQ), _mm256_set1_pd(1.0)))};
    }
    void store_codes(uint8_t* p) const {
        const __m128i i32 = _mm256_cvtpd_epi32(v);
        const __m128i i16 = _mm_packs_epi32(i32, i32);
        const int four = _mm_cvtsi128_si32(_mm_packus_epi16(i16, i16));
        std::memcpy(p, &four, 4);
    }
};

}  // namespace
