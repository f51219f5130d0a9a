// What elementary functions of doubles need beside arithmetic: exponents, tables, exact products. AVX-512.
#pragma once

#include "simd_avx512.hpp"

namespace {

inline F64 root(F64 a) { return {_mm512_sqrt_pd(a.v)}; }
inline F64 floor(F64 a) { return {_mm512_roundscale_pd(a.v, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC)}; }

// a = mantissa 2^exponent with mantissa in [1, 2), for a > 0, denormal numbers included
inline void split(F64 a, F64& mantissa, F64& exponent) {
    mantissa = {_mm512_getmant_pd(a.v, _MM_MANT_NORM_1_2, _MM_MANT_SIGN_src)};
    exponent = {_mm512_getexp_pd(a.v)};
}

// a 2^k for integers k, where neither a nor the result leaves the normal numbers
inline F64 times_power(F64 a, F64 k) { return {_mm512_scalef_pd(a.v, k.v)}; }

// table[index]; index holds small whole numbers
inline F64 gather(const double* table, F64 index) { return {_mm512_i64gather_pd(_mm512_cvttpd_epi64(index.v), table, 8)}; }

// a b = product + error
inline F64 product(F64 a, F64 b, F64& error) {
    const F64 p = a * b;
    error = {_mm512_fmsub_pd(a.v, b.v, p.v)};
    return p;
}

}  // namespace
