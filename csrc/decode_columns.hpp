// Columns [first, last) of one packed row to float32 or bfloat16, written once for every vector type: L codes at a time, which start at a whole byte where
// their first column is a multiple of L, for L b is a multiple of 8. `Unpack` (unpack_*.hpp) holds the scale and zero point of every lane:
//     group(scale, zero)       of all lanes
//     from(lane, scale, zero)  of `lane` and those behind it: where a group ends among the L codes; then `store_mixed` once, and `group` again
//     store(source, to)        the L codes that start at `source`
#pragma once

#include <cstring>

#include "packing.hpp"

namespace {

// `row`: its first byte; nothing at or behind `end` is read. `first`: a multiple of L. scale_of(g), zero_of(g): of the row's groups.
template <class Unpack, class T, class Scale, class Zero>
void decode_columns(Unpack& unpack, int bits, const uint8_t* row, const uint8_t* end, int64_t group, int64_t first, int64_t last, Scale scale_of,
                    Zero zero_of, T* to) {
    constexpr int64_t L = Unpack::lanes;
    const int64_t step = L / 8 * bits;
    const uint8_t* bytes = row + first / L * step;
    const uint8_t* const far = end - Unpack::reach;  // up to here a vector may be read
    uint8_t tail[Unpack::reach];
    int64_t g = first / group, i = first;
    while (i < last) {
        int64_t until = (g + 1) * group;  // the first column behind the group
        unpack.group(scale_of(g), zero_of(g));
        const int64_t whole = (until < last ? until : last) - L;
        for (; i <= whole && bytes <= far; i += L, bytes += step, to += L) unpack.store(bytes, to);
        for (; i <= whole; i += L, bytes += step, to += L) unpack.store(padded(bytes, end, tail), to);
        if (until == i) ++g;
        if (until == i || i >= last) continue;
        const int64_t stop = i + L < last ? i + L : last;
        for (; until < stop; until += group) {
            ++g;
            unpack.from(static_cast<int>(until - i), scale_of(g), zero_of(g));
        }
        if (until == i + L) ++g;
        const uint8_t* const source = bytes <= far ? bytes : padded(bytes, end, tail);
        if (i + L <= last) {
            unpack.store_mixed(source, to);
        } else {
            T some[L];
            unpack.store_mixed(source, some);
            std::memcpy(to, some, sizeof(T) * (last - i));
        }
        i += L;
        bytes += step;
        to += L;
    }
}

}  // namespace
