// W[o, i] = scale[o, g] (code[o, i] - zero[o, g]),  g = i / group: integer codes in packed rows (packing.hpp), scales and zero points a group of a row.
#pragma once

#include <bit>
#include <cstdint>

namespace dither {

enum class ScaleStorage { float32, float16, bfloat16 };

struct PackedWeights {
    int64_t rows, columns, group, groups;  // O, I, g, G = ceil(I / g)
    int bits;
    const uint8_t* packed;  // [O, packed_stride(I, bits)]
    const void* scale;      // [O, G]
    ScaleStorage scale_type;
    const uint8_t* zero;  // [O, G], or nullptr: `middle` for all
    float middle;
};

}  // namespace dither

namespace {

inline float from_half(uint16_t h) {  // any finite one
    const uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16, rest = h & 0x7fff;
    const float magnitude = std::bit_cast<float>(rest << 13) * 0x1p112f;  // the exponent's bias moves from 15 to 127; subnormals come out right
    return std::bit_cast<float>(std::bit_cast<uint32_t>(magnitude) | sign);
}

inline float from_bfloat16(uint16_t b) { return std::bit_cast<float>(static_cast<uint32_t>(b) << 16); }

// `at`: o G + g
inline float scale_at(const dither::PackedWeights& w, int64_t at) {
    switch (w.scale_type) {
        case dither::ScaleStorage::float32: return static_cast<const float*>(w.scale)[at];
        case dither::ScaleStorage::float16: return from_half(static_cast<const uint16_t*>(w.scale)[at]);
        default: return from_bfloat16(static_cast<const uint16_t*>(w.scale)[at]);
    }
}

inline float zero_at(const dither::PackedWeights& w, int64_t at) { return w.zero ? static_cast<float>(w.zero[at]) : w.middle; }

}  // namespace
