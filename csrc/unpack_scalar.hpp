// Eight codes of one group, from one 64-bit word, to float32 or bfloat16: scale (code - zero), rounded once more for bfloat16.
#pragma once

#include <cstdint>
#include <cstring>

#include "bfloat16.hpp"

namespace {

struct Unpack {
    static constexpr int lanes = 8, reach = 8;
    int bits;
    uint64_t mask;
    float scale, zero;
    explicit Unpack(int b) : bits(b), mask((1u << b) - 1), scale(0), zero(0) {}

    void group(float s, float z) {
        scale = s;
        zero = z;
    }
    void store(const uint8_t* source, float* to) const {
        each(source, [&](int l, float x) { to[l] = x; });
    }
    void store(const uint8_t* source, uint16_t* to) const {
        each(source, [&](int l, float x) { to[l] = to_bfloat16(x); });
    }
    template <class Store>
    void each(const uint8_t* source, Store put_one) const {
        uint64_t word;
        std::memcpy(&word, source, 8);
        for (int l = 0; l < lanes; ++l) put_one(l, scale * (static_cast<float>((word >> l * bits) & mask) - zero));
    }
};

}  // namespace
