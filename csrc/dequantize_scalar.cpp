#include "dequantize_row.hpp"

namespace {

// Eight codes from one 64-bit word.
struct Unpack {
    static constexpr int lanes = 8, reach = 8;
    int bits;
    uint64_t mask;
    const float* table;
    Unpack(int b, const float* t) : bits(b), mask((1u << b) - 1), table(t) {}

    template <class Store>
    void each(const uint8_t* source, float scale, float zero, Store store) const {
        uint64_t word;
        std::memcpy(&word, source, 8);
        for (int l = 0; l < lanes; ++l) {
            const int code = static_cast<int>((word >> l * bits) & mask);
            store(l, scale * ((table ? table[code] : static_cast<float>(code)) - zero));
        }
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

DequantizeRow dequantize_row_scalar(const DequantizeProblem&) { return dequantize_row<Unpack>; }

}  // namespace dither
