// One row of hadamard.hpp, written once for every vector type.
#pragma once

#include <cstring>

#include "hadamard.hpp"
#include "outer.hpp"
#include "walsh.hpp"

namespace {

using dither::HadamardProblem;

constexpr int64_t pad = dither::hadamard_lanes;

inline void read_row(const HadamardProblem& p, int64_t row, float* to) {
    const float scale = p.scale;
    if (!p.bfloat16) {
        const float* from = static_cast<const float*>(p.x) + row * p.columns;
        for (int64_t i = 0; i < p.columns; ++i) to[i] = from[i] * scale;
        return;
    }
    const uint16_t* from = static_cast<const uint16_t*>(p.x) + row * p.columns;
    for (int64_t i = 0; i < p.columns; ++i) {
        const uint32_t bits = static_cast<uint32_t>(from[i]) << 16;
        float value;
        std::memcpy(&value, &bits, 4);
        to[i] = value * scale;
    }
}

inline void write_row(const HadamardProblem& p, int64_t row, const float* from) {
    if (!p.bfloat16) {
        std::memcpy(static_cast<float*>(p.y) + row * p.columns, from, p.columns * sizeof(float));
        return;
    }
    uint16_t* to = static_cast<uint16_t*>(p.y) + row * p.columns;
    for (int64_t i = 0; i < p.columns; ++i) {
        uint32_t bits;
        std::memcpy(&bits, from + i, 4);
        const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;  // half to even
        to[i] = static_cast<uint16_t>((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
    }
}

// to[b, :] = sum_j from[b, j] signs[j, :], for M blocks b at once; signs rows of `width` >= d, padded with zeros
template <class V, int M>
void multiply_last_of(const float* from, float* to, const float* signs, int64_t d, int64_t width) {
    constexpr int L = V::lanes;
    for (int64_t c = 0; c < d; c += L) {
        V sum[M];
#pragma GCC unroll 16
        for (int m = 0; m < M; ++m) sum[m] = V::set1(0.0f);
        for (int64_t j = 0; j < d; ++j) {
            const V s = V::load(signs + j * width + c);
#pragma GCC unroll 16
            for (int m = 0; m < M; ++m) sum[m] = V::fmadd(V::set1(from[m * d + j]), s, sum[m]);
        }
        if (c + L <= d) {
#pragma GCC unroll 16
            for (int m = 0; m < M; ++m) sum[m].store(to + m * d + c);
        } else {
            float last[M][L];
#pragma GCC unroll 16
            for (int m = 0; m < M; ++m) sum[m].store(last[m]);
            for (int m = 0; m < M; ++m) std::memcpy(to + m * d + c, last[m], (d - c) * sizeof(float));
        }
    }
}

template <class V>
void multiply_last(const float* from, float* to, int64_t blocks, const float* signs, int64_t d) {
    const int64_t width = (d + pad - 1) / pad * pad;
    int64_t b = 0;
    for (; b + 12 <= blocks; b += 12) multiply_last_of<V, 12>(from + b * d, to + b * d, signs, d, width);
    for (; b + 4 <= blocks; b += 4) multiply_last_of<V, 4>(from + b * d, to + b * d, signs, d, width);
    for (; b < blocks; ++b) multiply_last_of<V, 1>(from + b * d, to + b * d, signs, d, width);
}

template <class V>
void hadamard_row(const HadamardProblem& p, int64_t row, float* buffers) {
    float *from = buffers, *to = buffers + p.columns + pad;
    read_row(p, row, from);
    const float* signs = p.signs;
    int64_t blocks = 1, inner = p.columns;
    for (int64_t f = 0; f < p.factors; ++f) {
        const int64_t d = p.sizes[f];
        inner /= d;
        if (inner == 1) {
            multiply_last<V>(from, to, blocks, signs, d);
        } else {
            for (int64_t b = 0; b < blocks; ++b) multiply_outer<V>(from + b * d * inner, inner, to + b * d * inner, inner, signs, d, inner);
        }
        signs += d * d;
        blocks *= d;
        float* const done = to;
        to = from;
        from = done;
    }
    if (p.power > 1)
        for (int64_t b = 0; b < blocks; ++b) walsh<V>(from + b * p.power, p.power, 1, 1.0f);
    write_row(p, row, from);
}

}  // namespace
