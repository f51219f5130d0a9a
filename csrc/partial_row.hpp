// One row of partial.hpp. First all weights get one of their two levels, `Levels` turning L bits of the plane into L values; then the salient
// ones, word by word of the mask, are written over them.
#pragma once

#include <cstring>

#include "bfloat16.hpp"
#include "packing.hpp"
#include "partial.hpp"

namespace {

// `bits` <= 8 bits from `at` of a stream; what lies beyond its end is zero
inline unsigned bits_at(const uint8_t* stream, int64_t bytes, int64_t at, int bits) {
    const int64_t byte = at / 8;
    const unsigned one = byte < bytes ? stream[byte] : 0, two = byte + 1 < bytes ? stream[byte + 1] << 8 : 0;
    return ((one | two) >> at % 8) & ((1u << bits) - 1);
}

inline uint32_t word_at(const uint8_t* bitmap, int64_t word) {
    uint32_t bits;
    std::memcpy(&bits, bitmap + 4 * word, 4);
    return bits;
}

template <class Levels>
void two_levels(const dither::PartialProblem& p, int64_t row, const uint8_t* plane, void* to) {
    constexpr int L = Levels::lanes;
    for (int64_t g = 0; g < p.groups; ++g) {
        const float low = p.low[row * p.groups + g], high = p.high[row * p.groups + g];
        const Levels levels(low, high);
        const int64_t first = g * p.group, last = first + p.group < p.columns ? first + p.group : p.columns;
        int64_t i = first;
        const auto one = [&] { put(to, i, plane[i / 8] >> i % 8 & 1 ? high : low, p.bfloat16); };
        for (; i < last && i % L; ++i) one();
        for (; i + L <= last; i += L) {
            if (p.bfloat16)
                levels.store_bfloat16(plane + i / 8, static_cast<uint16_t*>(to) + i);
            else
                levels.store_float32(plane + i / 8, static_cast<float*>(to) + i);
        }
        for (; i < last; ++i) one();
    }
}

inline void salient(const dither::PartialProblem& p, int64_t row, const uint8_t* mask, const uint8_t* plane, void* to) {
    const int64_t words = dither::packed_stride(p.columns, 1) / 4;
    const float scale = p.scale[row], zero = p.zero[row];
    int64_t at = (p.offsets ? static_cast<int64_t>(p.offsets[row]) : row * p.columns) * p.rest;
    for (int64_t w = 0; w < words; ++w) {
        const int64_t inside = p.columns - 32 * w;
        const uint32_t top = word_at(plane, w), valid = inside < 32 ? (1u << inside) - 1 : ~0u;
        for (uint32_t left = (mask ? ~word_at(mask, w) : ~0u) & valid; left; left &= left - 1, at += p.rest) {
            const int bit = __builtin_ctz(left);
            const unsigned code = bits_at(p.codes, p.code_bytes, at, p.rest) | (top >> bit & 1) << p.rest;
            put(to, 32 * w + bit, scale * (static_cast<float>(code) - zero), p.bfloat16);
        }
    }
}

template <class Levels>
void decode_row(const dither::PartialProblem& p, int64_t row, void* to) {
    const int64_t stride = dither::packed_stride(p.columns, 1);
    const uint8_t* const mask = p.mask ? p.mask + row * stride : nullptr;
    const uint8_t* const plane = p.plane + row * stride;
    if (mask || !p.codes) two_levels<Levels>(p, row, plane, to);
    if (p.codes) salient(p, row, mask, plane, to);
}

template <class Levels>
void partial_row(const dither::PartialProblem& p, int64_t row) {
    decode_row<Levels>(p, row, static_cast<char*>(p.values) + row * p.columns * (p.bfloat16 ? 2 : 4));
}

}  // namespace
