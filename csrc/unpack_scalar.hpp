// Eight codes, from one 64-bit word, to float32 or bfloat16: scale (code - zero), rounded once more for bfloat16.
#pragma once

#include <cstdint>
#include <cstring>

#include "bfloat16.hpp"

namespace {

struct Unpack {
    static constexpr int lanes = 8, reach = 8;
    int bits;
    uint64_t mask;
    float scale[lanes], zero[lanes];
    explicit Unpack(int b) : bits(b), mask((1u << b) - 1), scale(), zero() {}

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
        for (int l = 0; l < lanes; ++l) put(l, scale[l] * (static_cast<float>((word >> l * bits) & mask) - zero[l]));
    }
};

}  // namespace
