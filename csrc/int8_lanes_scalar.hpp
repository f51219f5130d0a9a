// Four int32, or a block of sixteen bytes, in plain C++, for int8_matmul.hpp.
#pragma once

#include "storage_scalar.hpp"

namespace {

struct Int {
    static constexpr int lanes = 4, blocks = 1;
    int32_t v[lanes];

    template <class F>
    static Int each(F f) { return {{f(0), f(1), f(2), f(3)}}; }
    static Int zero() { return set1(0); }
    static Int set1(int32_t x) { return {{x, x, x, x}}; }
    static Int load(const void* p) {
        Int r;
        std::memcpy(r.v, p, sizeof r.v);
        return r;
    }
    static Int bits(F32 x) { return load(x.v); }
    static Int widened(const uint8_t* p) { return each([&](int l) { return p[l]; }); }
    void store(void* p) const { std::memcpy(p, v, sizeof v); }
    F32 floats() const { return F32::each([&](int l) { return static_cast<float>(v[l]); }); }
    friend Int operator+(Int a, Int b) { return each([&](int l) { return a.v[l] + b.v[l]; }); }
    friend Int operator-(Int a, Int b) { return each([&](int l) { return a.v[l] - b.v[l]; }); }
    friend Int operator*(Int a, Int b) { return each([&](int l) { return a.v[l] * b.v[l]; }); }

    // numbers of 16 bits in pairs: of the low halves of two, and sum + low low + high high, exactly
    static Int pair(Int low, Int high) {
        return each([&](int l) { return (low.v[l] & 0xffff) | static_cast<int32_t>(static_cast<uint32_t>(high.v[l]) << 16); });
    }
    static Int add_pairs(Int sum, Int a, Int b) {
        const auto low = [](int32_t x) { return static_cast<int16_t>(x & 0xffff); };
        return each([&](int l) { return sum.v[l] + low(a.v[l]) * low(b.v[l]) + (a.v[l] >> 16) * (b.v[l] >> 16); });
    }

    // lane i becomes the sum of r[i]'s lanes
    static Int sum4(const Int (&r)[4]) { return each([&](int l) { return r[l].v[0] + r[l].v[1] + r[l].v[2] + r[l].v[3]; }); }
    static void transpose_lanes(Int* r) {
        for (int i = 0; i < 4; ++i)
            for (int k = 0; k < i; ++k) {
                const int32_t x = r[i].v[k];
                r[i].v[k] = r[k].v[i];
                r[k].v[i] = x;
            }
    }
    static void transpose_blocks(Int*) {}
};

inline void store_signed(F32 x, int8_t* p) {
    for (int l = 0; l < F32::lanes; ++l) p[l] = static_cast<int8_t>(x.v[l]);
}

}  // namespace
