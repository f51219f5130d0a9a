// One row of packed_matmul.hpp, written once for every vector type: L codes at a time to their values (`Codes`), a product and sum for each token.
// Groups that are no multiple of L, and the last columns, go one by one.
#pragma once

#include <cstring>

#include "packed_matmul.hpp"
#include "packing.hpp"

namespace {

inline void read_scales(const dither::PackedMatmul& p, int64_t o, float* to) {
    for (int64_t g = 0; g < p.groups; ++g) to[g] = scale_at(p, o * p.groups + g);
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
