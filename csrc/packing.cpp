#include "packing.hpp"

#include <algorithm>
#include <bit>
#include <cstring>

namespace dither {

namespace {

static_assert(std::endian::native == std::endian::little, "bytes of a word are taken in memory order");

// Eight codes in the bytes of a word <-> 8 b bits: three steps join neighbours (bytes to 2 b bits in 16, 4 b in 32, 8 b in 64).
struct Joints {
    uint64_t low8, low16, low32;  // the lower neighbour of each pair
    int shift8, shift16, shift32;
    explicit Joints(int b)
        : low8(((1ull << b) - 1) * 0x0001000100010001ull),
          low16(((1ull << 2 * b) - 1) * 0x0000000100000001ull),
          low32((1ull << 4 * b) - 1),
          shift8(8 - b), shift16(16 - 2 * b), shift32(32 - 4 * b) {}

    uint64_t join(uint64_t x) const {
        x = (x & low8) | ((x & (low8 << 8)) >> shift8);
        x = (x & low16) | ((x & (low16 << 16)) >> shift16);
        return (x & low32) | ((x & (low32 << 32)) >> shift32);
    }
    uint64_t split(uint64_t x) const {
        x = (x & low32) | ((x & (low32 << (32 - shift32))) << shift32);
        x = (x & low16) | ((x & (low16 << (16 - shift16))) << shift16);
        return (x & low8) | ((x & (low8 << (8 - shift8))) << shift8);
    }
};

// Up to eight bytes; all eight at once but at the end of a row.
uint64_t read(const uint8_t* from, int64_t available) {
    uint64_t word = 0;
    if (available >= 8)
        std::memcpy(&word, from, 8);
    else
        std::memcpy(&word, from, available);
    return word;
}

void write(uint8_t* to, uint64_t word, int64_t room) {
    if (room >= 8)
        std::memcpy(to, &word, 8);
    else
        std::memcpy(to, &word, room);
}

}  // namespace

void pack_rows(const uint8_t* codes, int64_t rows, int64_t columns, int bits, uint8_t* packed, [[maybe_unused]] int threads) {
    const int64_t stride = packed_stride(columns, bits);
    const Joints joints(bits);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t r = 0; r < rows; ++r) {
        const uint8_t* from = codes + r * columns;
        uint8_t* to = packed + r * stride;
        uint8_t* const end = to + stride;
        for (int64_t c = 0; c < columns; c += 8, to += bits) {
            const uint64_t eight = joints.join(read(from + c, columns - c));
            write(to, eight, end - to < 8 ? std::min<int64_t>(bits, end - to) : 8);  // bytes past `bits` are written again
        }
        if (to < end) std::memset(to, 0, end - to);
    }
}

void unpack_rows(const uint8_t* packed, int64_t rows, int64_t columns, int bits, uint8_t* codes, [[maybe_unused]] int threads) {
    const int64_t stride = packed_stride(columns, bits);
    const Joints joints(bits);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t r = 0; r < rows; ++r) {
        const uint8_t* from = packed + r * stride;
        const uint8_t* const end = from + stride;
        uint8_t* to = codes + r * columns;
        for (int64_t c = 0; c < columns; c += 8, from += bits) {
            write(to + c, joints.split(read(from, end - from)), columns - c);
        }
    }
}

}  // namespace dither
