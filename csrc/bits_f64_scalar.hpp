// What elementary functions of doubles need beside arithmetic: exponents, tables, exact products. Plain C++.
#pragma once

#include "simd_scalar.hpp"

namespace {

inline F64 root(F64 a) { return F64::each([&](int i) { return std::sqrt(a.v[i]); }); }
inline F64 floor(F64 a) { return F64::each([&](int i) { return std::floor(a.v[i]); }); }

// a = mantissa 2^exponent with mantissa in [0.75, 1.5), for a > 0, denormal numbers included
inline void split(F64 a, F64& mantissa, F64& exponent) {
    for (int i = 0; i < F64::lanes; ++i) {
        const bool small = a.v[i] < 0x1p-1022;
        const double normal = small ? a.v[i] * 0x1p54 : a.v[i];
        int64_t bits;
        std::memcpy(&bits, &normal, 8);
        const int64_t upper = bits >> 51 & 1;  // 1.5 or more
        exponent.v[i] = static_cast<double>((bits >> 52) - (small ? 1023 + 54 : 1023) + upper);
        bits = (bits & 0xfffffffffffff) | (0x3ff - upper) << 52;
        std::memcpy(&mantissa.v[i], &bits, 8);
    }
}

// a 2^k for integers k, where neither a nor the result leaves the normal numbers
inline F64 times_power(F64 a, F64 k) {
    return F64::each([&](int i) {
        int64_t bits;
        std::memcpy(&bits, &a.v[i], 8);
        bits += static_cast<int64_t>(k.v[i]) * (int64_t(1) << 52);
        double result;
        std::memcpy(&result, &bits, 8);
        return result;
    });
}

// The multiple of 1/32 that is nearest to each lane of m in [0.75, 1.5], modulo 1, as an index into columns of 32 doubles.
struct Row {
    int index[F64::lanes];

    explicit Row(F64 m) {
        for (int i = 0; i < F64::lanes; ++i) {
            const double shifted = m.v[i] + 0x1.8p47;
            int64_t bits;
            std::memcpy(&bits, &shifted, 8);
            index[i] = static_cast<int>(bits & 31);
        }
    }
    F64 of(const double* column) const {
        return F64::each([&](int i) { return column[index[i]]; });
    }
};

// a b = product + error, without a fused multiply-add (Dekker)
inline F64 product(F64 a, F64 b, F64& error) {
    const F64 p = a * b, factor = F64::set1(134217729.0);
    const F64 ca = factor * a, cb = factor * b;
    const F64 a_high = ca - (ca - a), b_high = cb - (cb - b);
    const F64 a_low = a - a_high, b_low = b - b_high;
    error = ((a_high * b_high - p) + a_high * b_low + a_low * b_high) + a_low * b_low;
    return p;
}

}  // namespace
