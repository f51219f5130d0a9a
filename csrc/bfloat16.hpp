// float32 to bfloat16, and values of either type written to a row.
#pragma once

#include <cstdint>
#include <cstring>

namespace {

inline uint16_t to_bfloat16(float x) {  // half to even; NaN stays NaN
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    if (x != x) return 0x7fc0;
    return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline void put(void* row, int64_t i, float x, bool bfloat16) {
    if (bfloat16)
        static_cast<uint16_t*>(row)[i] = to_bfloat16(x);
    else
        static_cast<float*>(row)[i] = x;
}

}  // namespace
