// What ext_exp.hpp needs of AVX2: 2^k is made of its bits, and what would be subnormal becomes 0.
#pragma once

#include "simd_avx2.hpp"

namespace {

inline F32 nearest(F32 x) { return F32::round(x); }
inline F64 nearest(F64 x) { return F64::round(x); }

// m 2^k for integers -127 <= k <= 0, and 0 for k = -127: the sum with 1.5 2^23 + 127 has the biased exponent in its last bits
inline F32 scaled_bounded(F32 m, F32 k) {
    const __m256i bits = _mm256_castps_si256(_mm256_add_ps(k.v, _mm256_set1_ps(0x1.8000FEp23f)));
    return {_mm256_mul_ps(m.v, _mm256_castsi256_ps(_mm256_slli_epi32(bits, 23)))};
}
inline F64 scaled_bounded(F64 m, F64 k) {  // -1023 likewise
    const __m256i bits = _mm256_castpd_si256(_mm256_add_pd(k.v, _mm256_set1_pd(0x1.8p52 + 1023)));
    return {_mm256_mul_pd(m.v, _mm256_castsi256_pd(_mm256_slli_epi64(bits, 52)))};
}

// m 2^k for any integer k <= 0
inline F32 scaled(F32 m, F32 k) { return scaled_bounded(m, F32::max(k, F32::set1(-127.0f))); }
inline F64 scaled(F64 m, F64 k) { return scaled_bounded(m, F64::max(k, F64::set1(-1023.0))); }

// x - n ln 2
inline F32 reduced(F32 x, F32 n) { return F32::fmadd(n, F32::set1(0x1.05C61p-29f), F32::fmadd(n, F32::set1(-0x1.62E43p-1f), x)); }

constexpr double bottom(float) { return -88.0; }    // the nearest integer to x log2(e) is -127
constexpr double bottom(double) { return -709.0; }  // -1023

constexpr int block = 8;  // vectors that pass 1 brings to a common exponent; with 4, 6 or 12 it is no faster

}  // namespace
