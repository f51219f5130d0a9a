// Eight codes, from one 64-bit word, to float32 or bfloat16: scale (value - zero), rounded once more for bfloat16.
#pragma once

#include <cstdint>
#include <cstring>

#include "bfloat16.hpp"

namespace {

struct Unpack {
    static constexpr int lanes = 8, reach = 8;
    int bits;
    uint64_t mask;
    const float* table;  // nullptr: codes are their own values
    float scale[lanes], zero[lanes];
    Unpack(int b, const float* t) : bits(b), mask((1u << b) - 1), table(t), scale(), zero() {}

    void group(float s, float z) { from(0, s, z); }
    void from(int lane, float s, float z) {
        for (; lane < lanes; ++lane) scale[lane] = s, zero[lane] = z;
    }
    void store(const uint8_t* source, float* to) const {
        each(source, [&](int l, float x) { to[l] = x; });
    }
    void store(const uint8_t* source, uint16_t* to) const {
        each(source, [&](int l, float x) { to[l] = to_bfloat16(x); });
    }
    template <class T>
    void store_mixed(const uint8_t* source, T* to) const { store(source, to); }
    template <class Store>
    void each(const uint8_t* source, Store put) const {
        uint64_t word;
        std::memcpy(&word, source, 8);
        for (int l = 0; l < lanes; ++l) {
            const int code = static_cast<int>((word >> l * bits) & mask);
            put(l, scale[l] * ((table ? table[code] : static_cast<float>(code)) - zero[l]));
        }
    }
};

}  // namespace
