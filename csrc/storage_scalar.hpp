// Rows of float32, float64, bfloat16 and float16 to vectors and back, in plain C++: whole vectors and the first `n` lanes of one.
// Narrow types are rounded half to even; NaN stays NaN.
#pragma once

#include "bfloat16.hpp"
#include "simd_scalar.hpp"
#include "storage.hpp"

namespace {

using dither::BFloat16;
using dither::Float16;

inline float float_of(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}

inline float widened(float x) { return x; }
inline double widened(double x) { return x; }
inline float widened(BFloat16 x) { return float_of(static_cast<uint32_t>(x.bits) << 16); }
inline float widened(Float16 x) {
    const uint32_t sign = (x.bits & 0x8000u) << 16, rest = x.bits & 0x7fffu;
    if (rest >= 0x7c00) return float_of(sign | 0x7f800000u | rest << 13);  // inf, NaN
    const float size = float_of(rest << 13) * 0x1p112f;                    // exact, and so for subnormals: the exponents' biases differ by 112
    return sign ? -size : size;
}

inline void narrow(float x, float& to) { to = x; }
inline void narrow(double x, double& to) { to = x; }
inline void narrow(float x, BFloat16& to) { to.bits = to_bfloat16(x); }
inline void narrow(float x, Float16& to) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    const uint32_t sign = bits >> 16 & 0x8000u;
    bits &= 0x7fffffff;
    uint32_t half;
    if (bits > 0x7f800000) {
        half = 0x7e00;  // NaN
    } else if (bits >= 0x47800000) {
        half = 0x7c00;  // 2^16 and more
    } else if (bits < 0x38800000) {  // subnormal: adding 1/2 leaves the code, rounded, in the last bits
        const float moved = float_of(bits) + 0.5f;
        std::memcpy(&half, &moved, 4);
        half -= 0x3f000000;
    } else {
        half = (bits - (112u << 23) + 0xfff + (bits >> 13 & 1)) >> 13;
    }
    to.bits = static_cast<uint16_t>(sign | half);
}

inline F32 vector_for(const void*) { return {}; }
inline F64 vector_for(const double*) { return {}; }

template <class T>
auto load(const T* p) {
    using V = decltype(vector_for(p));
    return V::each([&](int i) { return widened(p[i]); });
}
template <class T, class Real>
auto load_first(const T* p, int64_t n, Real fill) {  // the other lanes become `fill`
    using V = decltype(vector_for(p));
    return V::each([&](int i) { return i < n ? widened(p[i]) : fill; });
}
template <class T, class V>
void store(T* p, V x) {
    for (int i = 0; i < V::lanes; ++i) narrow(x.v[i], p[i]);
}
template <class T, class V>
void store_first(T* p, V x, int64_t n) {
    for (int i = 0; i < n; ++i) narrow(x.v[i], p[i]);
}
template <class T, class V>
void stream(T* p, V x) { store(p, x); }  // plain C++ has no store past the caches
inline void streamed() {}

}  // namespace
