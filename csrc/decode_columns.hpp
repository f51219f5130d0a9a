// Columns [first, last) of one packed row to float32 or bfloat16, written once for every vector type. Codes [c, c + L) of a row start at a whole byte
// where c is a multiple of L, for L b is a multiple of 8; `Unpack` (unpack_*.hpp) turns the bytes there into L numbers. What lies before the first and
// behind the last such code of a group goes one by one.
#pragma once

#include <cstring>

#include "bfloat16.hpp"
#include "packing.hpp"

namespace {

inline void put_one(float* to, float x) { *to = x; }
inline void put_one(uint16_t* to, float x) { *to = to_bfloat16(x); }

// `row`: its first byte; nothing at or behind `end` is read. scale_of(g), zero_of(g): of the row's groups.
template <class Unpack, class T, class Scale, class Zero>
void decode_columns(Unpack& unpack, int bits, const uint8_t* row, const uint8_t* end, int64_t group, int64_t first, int64_t last, Scale scale_of,
                    Zero zero_of, T* to) {
    constexpr int L = Unpack::lanes;
    to -= first;  // to[i] is column i
    for (int64_t g = first / group, i = first; i < last; ++g) {
        const float scale = scale_of(g), zero = zero_of(g);
        const int64_t until = (g + 1) * group < last ? (g + 1) * group : last;
        for (; i < until && i % L != 0; ++i) put_one(to + i, scale * (code_at(row, end, i, bits) - zero));
        if (i + L <= until) {
            unpack.group(scale, zero);
            for (const uint8_t* bytes = row + i / 8 * bits; i + L <= until; i += L, bytes += L / 8 * bits) {
                uint8_t tail[Unpack::reach];
                unpack.store(readable(bytes, end, tail), to + i);
            }
        }
        for (; i < until; ++i) put_one(to + i, scale * (code_at(row, end, i, bits) - zero));
    }
}

}  // namespace
