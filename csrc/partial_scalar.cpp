#include "partial_matmul_row.hpp"
#include "simd_scalar.hpp"

namespace {

struct Levels {
    static constexpr int lanes = 8;
    float level[2];  // looked up: a branch on random bits costs more than all else here
    uint16_t level16[2];
    Levels(float low, float high) : level{low, high}, level16{to_bfloat16(low), to_bfloat16(high)} {}
    void store_float32(const uint8_t* bits, float* to) const {
        for (int l = 0; l < lanes; ++l) to[l] = level[*bits >> l & 1];
    }
    void store_bfloat16(const uint8_t* bits, uint16_t* to) const {
        for (int l = 0; l < lanes; ++l) to[l] = level16[*bits >> l & 1];
    }
};

}  // namespace

namespace dither {

PartialRow partial_row_scalar() { return partial_row<Levels>; }
PartialRows partial_rows_scalar() { return partial_rows<Levels, F32>; }

}  // namespace dither
