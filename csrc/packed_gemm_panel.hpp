// A panel of packed_gemm.hpp: sixteen rows of weights decoded, then turned so that a vector holds one lane of each.
#pragma once

#include <cstring>

#include "decode_columns.hpp"
#include "packed_gemm.hpp"

namespace {

// What the next block wants of a row comes into the second cache meanwhile: rows are far apart, and so little is read of one at a time that the
// processor does not see where it goes on.
inline void fetch(const void* from, int64_t bytes) {
    const char* const p = static_cast<const char*>(from);
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(p + i, 0, 2);
    __builtin_prefetch(p + bytes - 1, 0, 2);
}

// T: float, or uint16_t for two bfloat16 a lane
template <class Unpack, class T, void (*transpose)(const float*, int64_t, float*)>
void decode_panel(const dither::PackedWeights& w, int64_t o, int64_t first, int64_t depth, float* rows, float* panel) {
    constexpr int64_t a_lane = sizeof(float) / sizeof(T);
    const int64_t stride = dither::packed_stride(w.columns, w.bits), column = first * a_lane;
    const int64_t count = w.columns - column < depth * a_lane ? w.columns - column : depth * a_lane;
    const int64_t next_group = (column + count) / w.group, scale_bytes = bytes_of(w.scale_type);
    Unpack unpack(w.bits, w.values);
    for (int64_t r = 0; r < dither::gemm_panel; ++r) {
        T* const to = reinterpret_cast<T*>(rows + r * depth);
        const int64_t there = o + r < w.rows ? count : 0, at = (o + r) * w.groups;
        if (there) {
            const uint8_t* const row = w.packed + (o + r) * stride;
            if (column + count < w.columns) {
                fetch(row + (column + count) * w.bits / 8, count * w.bits / 8);
                fetch(static_cast<const char*>(w.scale) + (at + next_group) * scale_bytes, scale_bytes);
                if (w.zero) fetch(w.zero + at + next_group, 1);
            }
            decode_columns(unpack, w.bits, row, w.packed + w.rows * stride, w.group, column, column + count,
                           [&](int64_t g) { return scale_at(w, at + g); }, [&](int64_t g) { return zero_at(w, at + g); }, to);
        }
        std::memset(to + there, 0, sizeof(T) * (depth * a_lane - there));
    }
    transpose(rows, depth, panel);
}

}  // namespace
