// One row of packed_matmul.hpp, written once for every vector type: L codes at a time to their values (`Codes`), a product and sum for each token.
// Groups that are no multiple of L, and the last columns, go one by one.
#pragma once

#include <bit>
#include <cstring>

#include "packed_matmul.hpp"
#include "packing.hpp"

namespace {

inline float from_half(uint16_t h) {  // any finite one
    const uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16, rest = h & 0x7fff;
    const float magnitude = std::bit_cast<float>(rest << 13) * 0x1p112f;  // the exponent's bias moves from 15 to 127; subnormals come out right
    return std::bit_cast<float>(std::bit_cast<uint32_t>(magnitude) | sign);
}

inline float from_e8m0(uint8_t b) { return std::bit_cast<float>(b ? static_cast<uint32_t>(b) << 23 : 0x00400000u); }

inline float from_e4m3(uint8_t b) {  // any finite one
    const float magnitude = std::bit_cast<float>(static_cast<uint32_t>(b & 0x7f) << 20) * 0x1p120f;
    return b & 0x80 ? -magnitude : magnitude;
}

inline void read_scales(const dither::PackedMatmul& p, int64_t o, float* to) {
    const int64_t first = o * p.groups;
    switch (p.scale_type) {
        case dither::ScaleStorage::float32: std::memcpy(to, static_cast<const float*>(p.scale) + first, sizeof(float) * p.groups); break;
        case dither::ScaleStorage::float16:
            for (int64_t g = 0; g < p.groups; ++g) to[g] = from_half(static_cast<const uint16_t*>(p.scale)[first + g]);
            break;
        case dither::ScaleStorage::bfloat16:
            for (int64_t g = 0; g < p.groups; ++g)
                to[g] = std::bit_cast<float>(static_cast<uint32_t>(static_cast<const uint16_t*>(p.scale)[first + g]) << 16);
            break;
        case dither::ScaleStorage::e8m0:
            for (int64_t g = 0; g < p.groups; ++g) to[g] = from_e8m0(static_cast<const uint8_t*>(p.scale)[first + g]);
            break;
        case dither::ScaleStorage::e4m3:
            for (int64_t g = 0; g < p.groups; ++g) to[g] = from_e4m3(static_cast<const uint8_t*>(p.scale)[first + g]);
    }
    for (int64_t g = 0; g < p.groups; ++g) to[g] *= p.tensor_scale;
}

// sum_g scale zero sum x: what the zero points take off
inline float taken_off(const dither::PackedMatmul& p, int64_t o, int64_t t, const float* scales) {
    const float* sums = p.sums + t * p.groups;
    float total = 0;
    if (p.zero) {
        const uint8_t* zero = p.zero + o * p.groups;
        for (int64_t g = 0; g < p.groups; ++g) total += scales[g] * static_cast<float>(zero[g]) * sums[g];
    } else {
        for (int64_t g = 0; g < p.groups; ++g) total += scales[g] * p.middle * sums[g];
    }
    return total;
}

template <class Codes, class V, int T>
void row_of_tokens(const dither::PackedMatmul& p, const Codes& codes, int64_t o, int64_t t0, const float* scales) {
    constexpr int L = V::lanes;
    const int64_t stride = dither::packed_stride(p.columns, p.bits), step = L * p.bits / 8;
    const uint8_t* const from = p.packed + o * stride;
    const uint8_t* const end = p.packed + p.rows * stride;
    V total[T];
    float rest[T];
    for (int t = 0; t < T; ++t) total[t] = V::set1(0), rest[t] = 0;
    for (int64_t g = 0; g < p.groups; ++g) {
        const int64_t first = g * p.group, last = first + p.group < p.columns ? first + p.group : p.columns;
        int64_t i = first;
        if (first % L == 0) {
            V sum[T];
            for (int t = 0; t < T; ++t) sum[t] = V::set1(0);
            const uint8_t* bytes = from + first / L * step;
            for (; i + L <= last; i += L, bytes += step) {
                uint8_t tail[Codes::reach];
                const V c = codes.values(readable(bytes, end, tail));
                for (int t = 0; t < T; ++t) sum[t] = V::fmadd(c, V::load(p.x + (t0 + t) * p.columns + i), sum[t]);
            }
            const V scale = V::set1(scales[g]);
            for (int t = 0; t < T; ++t) total[t] = V::fmadd(scale, sum[t], total[t]);
        }
        for (; i < last; ++i) {
            const float weight = scales[g] * value_of(p, index_at(from, end, i, p.bits));
            for (int t = 0; t < T; ++t) rest[t] += weight * p.x[(t0 + t) * p.columns + i];
        }
    }
    for (int t = 0; t < T; ++t) {
        float lanes[L];
        total[t].store(lanes);
        float sum = rest[t];
        for (int l = 0; l < L; ++l) sum += lanes[l];
        p.y[(t0 + t) * p.rows + o] = has_zeros(p) ? sum - taken_off(p, o, t0 + t, scales) : sum;
    }
}

template <class Codes, class V>
void packed_rows(const dither::PackedMatmul& p, int64_t first, int64_t last, float* scales) {
    const Codes codes(p);
    for (int64_t o = first; o < last; ++o) {
        read_scales(p, o, scales);
        int64_t t = 0;
        for (; t + 4 <= p.tokens; t += 4) row_of_tokens<Codes, V, 4>(p, codes, o, t, scales);
        for (; t < p.tokens; ++t) row_of_tokens<Codes, V, 1>(p, codes, o, t, scales);
    }
}

}  // namespace
