// What ext_exp.hpp needs of AVX-512: `vscalefps` takes any exponent, whatever comes out is rounded once, subnormals too.
#pragma once

#include "simd_avx512.hpp"

namespace {

inline F32 nearest(F32 x) { return F32::round(x); }
inline F64 nearest(F64 x) { return F64::round(x); }

// m 2^k for an integer k
inline F32 scaled(F32 m, F32 k) { return {_mm512_scalef_ps(m.v, k.v)}; }
inline F64 scaled(F64 m, F64 k) { return {_mm512_scalef_pd(m.v, k.v)}; }
template <class V>
V scaled_bounded(V m, V k) { return scaled(m, k); }

// x - n ln 2
inline F32 reduced(F32 x, F32 n) { return F32::fmadd(n, F32::set1(0x1.05C61p-29f), F32::fmadd(n, F32::set1(-0x1.62E43p-1f), x)); }

constexpr double bottom(float) { return -105.0; }   // e^x rounds to 0 from here on down
constexpr double bottom(double) { return -746.0; }

constexpr int block = 8;  // vectors that pass 1 brings to a common exponent; with 4, 6 or 12 it is no faster

}  // namespace
