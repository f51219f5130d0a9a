// W[o, i] = scale[o, g] (value(code[o, i]) - zero[o, g]),  g = i / group: codes in packed rows (packing.hpp), scales and zero points a group of a row. A
// code is its own value, or names one of a table: a small float, say.
#pragma once

#include <bit>
#include <cstdint>

namespace dither {

enum class ScaleStorage { float32, float16, bfloat16, e8m0, e4m3 };  // the last two: a byte, 2^(b - 127); a small float without infinities

struct PackedWeights {
    int64_t rows, columns, group, groups;  // O, I, g, G = ceil(I / g)
    int bits;
    const uint8_t* packed;  // [O, packed_stride(I, bits)]
    const void* scale;      // [O, G]
    ScaleStorage scale_type;
    const uint8_t* zero;  // [O, G], or nullptr: `middle` for all
    float middle;
    float tensor_scale = 1;         // of all weights, beside those of the groups
    const float* values = nullptr;  // [2^bits], or nullptr: codes are their own values
};

}  // namespace dither

namespace {

inline float from_half(uint16_t h) {  // any finite one
    const uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16, rest = h & 0x7fff;
    const float magnitude = std::bit_cast<float>(rest << 13) * 0x1p112f;  // the exponent's bias moves from 15 to 127; subnormals come out right
    return std::bit_cast<float>(std::bit_cast<uint32_t>(magnitude) | sign);
}

inline float from_bfloat16(uint16_t b) { return std::bit_cast<float>(static_cast<uint32_t>(b) << 16); }

inline float from_e8m0(uint8_t b) { return std::bit_cast<float>(b ? static_cast<uint32_t>(b) << 23 : 0x00400000u); }

inline float from_e4m3(uint8_t b) {  // any finite one, likewise
    const float magnitude = std::bit_cast<float>(static_cast<uint32_t>(b & 0x7f) << 20) * 0x1p120f;
    return b & 0x80 ? -magnitude : magnitude;
}

inline int64_t bytes_of(dither::ScaleStorage type) {
    return type == dither::ScaleStorage::float32 ? 4 : type == dither::ScaleStorage::float16 || type == dither::ScaleStorage::bfloat16 ? 2 : 1;
}

// `at`: o G + g
inline float scale_at(const dither::PackedWeights& w, int64_t at) {
    switch (w.scale_type) {
        case dither::ScaleStorage::float32: return static_cast<const float*>(w.scale)[at] * w.tensor_scale;
        case dither::ScaleStorage::float16: return from_half(static_cast<const uint16_t*>(w.scale)[at]) * w.tensor_scale;
        case dither::ScaleStorage::bfloat16: return from_bfloat16(static_cast<const uint16_t*>(w.scale)[at]) * w.tensor_scale;
        case dither::ScaleStorage::e8m0: return from_e8m0(static_cast<const uint8_t*>(w.scale)[at]) * w.tensor_scale;
        default: return from_e4m3(static_cast<const uint8_t*>(w.scale)[at]) * w.tensor_scale;
    }
}

inline float value_of(const dither::PackedWeights& w, int code) { return w.values ? w.values[code] : static_cast<float>(code); }

// Whether bfloat16 holds what codes mean.
inline bool fits_bfloat16(const dither::PackedWeights& w) {
    uint32_t lost = 0;
    for (int code = 0; w.values && code < 1 << w.bits; ++code) lost |= std::bit_cast<uint32_t>(w.values[code]) & 0xffff;
    return !lost;
}

// A zero point of all groups that comes off each value, which bfloat16 then holds all the same; 0 where it is to come off the sums.
inline float early_zero(const dither::PackedWeights& w) {
    return !w.zero && !w.values && w.middle >= -128 && w.middle <= 128 && w.middle == static_cast<float>(static_cast<int>(w.middle)) ? w.middle : 0.0f;
}

inline bool has_late_zeros(const dither::PackedWeights& w) { return w.zero || w.middle != early_zero(w); }

inline bool has_zeros(const dither::PackedWeights& w) { return w.zero || w.middle != 0; }

inline float zero_at(const dither::PackedWeights& w, int64_t at) { return w.zero ? static_cast<float>(w.zero[at]) : w.middle; }

}  // namespace
