// What elementary functions of doubles need beside arithmetic: exponents, tables, exact products. AVX2.
#pragma once

#include "simd_avx2.hpp"

namespace {

inline F64 root(F64 a) { return {_mm256_sqrt_pd(a.v)}; }
inline F64 floor(F64 a) { return {_mm256_round_pd(a.v, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC)}; }

// a = mantissa 2^exponent with mantissa in [0.75, 1.5), for a > 0, denormal numbers included
inline void split(F64 a, F64& mantissa, F64& exponent) {
    const F64 least = F64::set1(0x1p-1022);
    const F64 offset = F64::select_lt(a, least, F64::set1(0x1p52 + 1023 + 54), F64::set1(0x1p52 + 1023));
    const F64 normal = F64::select_lt(a, least, a * F64::set1(0x1p54), a);
    const __m256i bits = _mm256_castpd_si256(normal.v);
    // a small integer in the low bits of 2^52 is that number of units
    const __m256i magic = _mm256_castpd_si256(_mm256_set1_pd(0x1p52));
    const F64 floor = F64{_mm256_castsi256_pd(_mm256_or_si256(_mm256_srli_epi64(bits, 52), magic))} - offset;
    const __m256i fraction = _mm256_and_si256(bits, _mm256_set1_epi64x(0xfffffffffffff));
    const F64 m{_mm256_castsi256_pd(_mm256_or_si256(fraction, _mm256_castpd_si256(_mm256_set1_pd(1.0))))}, edge = F64::set1(1.5);
    mantissa = F64::select_lt(m, edge, m, m * F64::set1(0.5));
    exponent = F64::add_where_ge(floor, m, edge);
}

// a 2^k for integers k, where neither a nor the result leaves the normal numbers
inline F64 times_power(F64 a, F64 k) {
    const __m256i shifted = _mm256_slli_epi64(_mm256_castpd_si256((k + F64::set1(0x1.8p52)).v), 52);
    return {_mm256_castsi256_pd(_mm256_add_epi64(_mm256_castpd_si256(a.v), shifted))};
}

// The multiple of 1/32 that is nearest to each lane of m in [0.75, 1.5], modulo 1, as an index into columns of 32 doubles.
struct Row {
    __m256i index;

    explicit Row(F64 m) : index(_mm256_and_si256(_mm256_castpd_si256((m + F64::set1(0x1.8p47)).v), _mm256_set1_epi64x(31))) {}
    F64 of(const double* column) const { return {_mm256_i64gather_pd(column, index, 8)}; }
};

// a b = product + error
inline F64 product(F64 a, F64 b, F64& error) {
    const F64 p = a * b;
    error = {_mm256_fmsub_pd(a.v, b.v, p.v)};
    return p;
}

}  // namespace
