// LSB-first bit streams: code k of a row occupies bits [k b, (k + 1) b) of the row's bytes, 1 <= b <= 8. Row strides are padded to
// four bytes with zero bits.
#pragma once

#include <cstdint>
#include <cstring>

namespace dither {

inline int64_t packed_stride(int64_t columns, int bits) { return (columns * bits + 31) / 32 * 4; }

void pack_rows(const uint8_t* codes, int64_t rows, int64_t columns, int bits, uint8_t* packed, int threads);
void unpack_rows(const uint8_t* packed, int64_t rows, int64_t columns, int bits, uint8_t* codes, int threads);

}  // namespace dither

// What files of several instruction sets include must not be shared between them by the linker: hence no external linkage.
namespace {

// Code i of a row; nothing at or behind `end` is read.
inline int index_at(const uint8_t* row, const uint8_t* end, int64_t i, int bits) {
    const int64_t bit = i * bits;
    const uint8_t* p = row + bit / 8;
    const unsigned two = p[0] | (p + 1 < end ? p[1] << 8 : 0);
    return static_cast<int>((two >> bit % 8) & ((1u << bits) - 1));
}

// A copy in `tail` of what lies between `from` and `end`, padded with zeros. Not inlined: loops that seldom need it keep their registers.
template <int reach>
[[gnu::noinline]] const uint8_t* padded(const uint8_t* from, const uint8_t* end, uint8_t (&tail)[reach]) {
    std::memset(tail, 0, reach);
    std::memcpy(tail, from, end - from < reach ? end - from : reach);
    return tail;
}

// `from`, or that copy where `reach` bytes from there would go beyond `end`.
template <int reach>
inline const uint8_t* readable(const uint8_t* from, const uint8_t* end, uint8_t (&tail)[reach]) {
    return end - from >= reach ? from : padded(from, end, tail);
}

}  // namespace
