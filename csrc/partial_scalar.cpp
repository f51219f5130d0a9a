#include "partial_row.hpp"

namespace {

struct Levels {
    static constexpr int lanes = 8;
    float low, high;
    uint16_t low16, high16;
    Levels(float l, float h) : low(l), high(h), low16(to_bfloat16(l)), high16(to_bfloat16(h)) {}
    void store_float32(const uint8_t* bits, float* to) const {
        for (int l = 0; l < lanes; ++l) to[l] = *bits >> l & 1 ? high : low;
    }
    void store_bfloat16(const uint8_t* bits, uint16_t* to) const {
        for (int l = 0; l < lanes; ++l) to[l] = *bits >> l & 1 ? high16 : low16;
    }
};

}  // namespace

namespace dither {

PartialRow partial_row_scalar() { return partial_row<Levels>; }

}  // namespace dither
