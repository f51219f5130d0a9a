// What elementary functions of doubles need beside arithmetic: exponents, tables, exact products. AVX-512.
#pragma once

#include "simd_avx512.hpp"

namespace {

inline F64 root(F64 a) { return {_mm512_sqrt_pd(a.v)}; }
inline F64 floor(F64 a) { return {_mm512_roundscale_pd(a.v, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC)}; }

// a = mantissa 2^exponent with mantissa in [0.75, 1.5), for a > 0, denormal numbers included
inline void split(F64 a, F64& mantissa, F64& exponent) {
    mantissa = {_mm512_getmant_pd(a.v, _MM_MANT_NORM_p75_1p5, _MM_MANT_SIGN_src)};
    const __m512d one = _mm512_set1_pd(1), floor = _mm512_getexp_pd(a.v);
    exponent = {_mm512_mask_add_pd(floor, _mm512_cmp_pd_mask(mantissa.v, one, _CMP_LT_OQ), floor, one)};
}

// a 2^k for integers k, where neither a nor the result leaves the normal numbers
inline F64 times_power(F64 a, F64 k) { return {_mm512_scalef_pd(a.v, k.v)}; }

// The multiple of 1/32 that is nearest to each lane of m in [0.75, 1.5], modulo 1, as an index into columns of 32 doubles.
struct Row {
    __m512i index;
    __mmask8 upper;

    explicit Row(F64 m) : index(_mm512_castpd_si512((m + F64::set1(0x1.8p47)).v)), upper(_mm512_test_epi64_mask(index, _mm512_set1_epi64(16))) {}
    F64 of(const double* column) const {
        const __m512d low = _mm512_permutex2var_pd(_mm512_loadu_pd(column), index, _mm512_loadu_pd(column + 8));
        const __m512d high = _mm512_permutex2var_pd(_mm512_loadu_pd(column + 16), index, _mm512_loadu_pd(column + 24));
        return {_mm512_mask_blend_pd(upper, low, high)};
    }
};

// a b = product + error
inline F64 product(F64 a, F64 b, F64& error) {
    const F64 p = a * b;
    error = {_mm512_fmsub_pd(a.v, b.v, p.v)};
    return p;
}

}  // namespace
