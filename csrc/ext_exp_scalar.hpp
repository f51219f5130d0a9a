// What ext_exp.hpp needs of plain C++, which may have no fused product. What would be subnormal becomes 0.
#pragma once

#include "simd_scalar.hpp"

namespace {

// of |x| < 2^22 and 2^51; of larger x something as large
inline F32 nearest(F32 x) { return (x + F32::set1(0x1.8p23f)) - F32::set1(0x1.8p23f); }
inline F64 nearest(F64 x) { return (x + F64::set1(0x1.8p52)) - F64::set1(0x1.8p52); }

// m 2^k for integers -127 <= k <= 0, and 0 for k = -127: the sum with 1.5 2^23 + 127 has the biased exponent in its last bits
inline F32 scaled_bounded(F32 m, F32 k) {
    return F32::each([&](int i) {
        const float sum = k.v[i] + 0x1.8000FEp23f;
        uint32_t bits;
        std::memcpy(&bits, &sum, 4);
        bits <<= 23;
        float power;
        std::memcpy(&power, &bits, 4);
        return m.v[i] * power;
    });
}
inline F64 scaled_bounded(F64 m, F64 k) {  // -1023 likewise
    return F64::each([&](int i) {
        const double sum = k.v[i] + (0x1.8p52 + 1023);
        uint64_t bits;
        std::memcpy(&bits, &sum, 8);
        bits <<= 52;
        double power;
        std::memcpy(&power, &bits, 8);
        return m.v[i] * power;
    });
}

// m 2^k for any integer k <= 0
inline F32 scaled(F32 m, F32 k) { return scaled_bounded(m, F32::max(k, F32::set1(-127.0f))); }
inline F64 scaled(F64 m, F64 k) { return scaled_bounded(m, F64::max(k, F64::set1(-1023.0))); }

// x - n ln 2 in double, since float32 without fused products would need n ln 2 in three pieces
inline F32 reduced(F32 x, F32 n) {
    return F32::each([&](int i) { return static_cast<float>(static_cast<double>(x.v[i]) - static_cast<double>(n.v[i]) * 0x1.62e42fefa39efp-1); });
}

constexpr double bottom(float) { return -88.0; }    // the nearest integer to x log2(e) is -127
constexpr double bottom(double) { return -709.0; }  // -1023

constexpr int block = 8;  // vectors that pass 1 brings to a common exponent

}  // namespace
