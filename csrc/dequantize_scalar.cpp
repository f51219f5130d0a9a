#include "dequantize_row.hpp"

namespace {

// Eight codes from one 64-bit word.
struct Unpack {
    static constexpr int lanes = 8, reach = 8;
    int bits;
    uint64_t mask;
    explicit Unpack(int b) : bits(b), mask((1u << b) - 1) {}

    template <class Store>
    void each(const uint8_t* source, float scale, float zero, Store store) const {
        uint64_t word;
        std::memcpy(&word, source, 8);
        for (int l = 0; l < lanes; ++l) store(l, scale * (static_cast<float>((word >> l * bits) & mask) - zero));
    }
    void store_float32(const uint8_t* source, float scale, float zero, float* to) const {
        each(source, scale, zero, [&](int l, float x) { to[l] = x; });
    }
    void store_bfloat16(const uint8_t* source, float scale, float zero, uint16_t* to) const {
        each(source, scale, zero, [&](int l, float x) { to[l] = to_bfloat16(x); });
    }
};

}  // namespace

namespace dither {

DequantizeRow dequantize_row_scalar() { return dequantize_row<Unpack>; }

}  // namespace dither
