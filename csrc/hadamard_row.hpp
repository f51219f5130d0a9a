// One row of hadamard.hpp, written once for every vector type.
#pragma once

#include <cstring>

#include "hadamard.hpp"

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

// to[i, :] = sum_j signs[j, i] from[j, :] for M rows i at once; inner >= lanes, the last vector overlaps the one before it
template <class V, int M>
void multiply_outer_of(const float* from, float* to, const float* signs, int64_t d, int64_t inner) {
    constexpr int L = V::lanes;
    for (int64_t c = 0; c < inner; c += L) {
        const int64_t at = c + L <= inner ? c : inner - L;
        V sum[M];
#pragma GCC unroll 16
        for (int m = 0; m < M; ++m) sum[m] = V::set1(0.0f);
        for (int64_t j = 0; j < d; ++j) {
            const V x = V::load(from + j * inner + at);
#pragma GCC unroll 16
            for (int m = 0; m < M; ++m) sum[m] = V::fmadd(V::set1(signs[j * d + m]), x, sum[m]);
        }
#pragma GCC unroll 16
        for (int m = 0; m < M; ++m) sum[m].store(to + m * inner + at);
    }
}

template <class V>
void multiply_outer(const float* from, float* to, int64_t blocks, const float* signs, int64_t d, int64_t inner) {
    for (int64_t b = 0; b < blocks; ++b, from += d * inner, to += d * inner) {
        int64_t i = 0;
        for (; i + 12 <= d; i += 12) multiply_outer_of<V, 12>(from, to + i * inner, signs + i, d, inner);
        for (; i + 4 <= d; i += 4) multiply_outer_of<V, 4>(from, to + i * inner, signs + i, d, inner);
        for (; i < d; ++i) multiply_outer_of<V, 1>(from, to + i * inner, signs + i, d, inner);
    }
}

// x[i] +- x[i ^ distance] within a vector
template <class V, int distance>
V butterfly(V x) {
    float signs[V::lanes];
    for (int i = 0; i < V::lanes; ++i) signs[i] = i & distance ? -1.0f : 1.0f;
    return V::fmadd(x, V::load(signs), V::template exchange<distance>(x));
}

// The Walsh-Hadamard transform of x[0 .. n), n a power of two >= 16, in place; distances 1, 2, 4, ... in this order
template <class V>
void walsh(float* x, int64_t n) {
    constexpr int L = V::lanes;
    for (int64_t i = 0; i < n; i += L) {
        V v = V::load(x + i);
        v = butterfly<V, 1>(v);
        v = butterfly<V, 2>(v);
        if constexpr (L > 4) v = butterfly<V, 4>(v);
        if constexpr (L > 8) v = butterfly<V, 8>(v);
        v.store(x + i);
    }
    int64_t h = L;
    for (; 2 * h < n; h *= 4) {  // two distances in one pass
        for (int64_t i = 0; i < n; i += 4 * h) {
            for (int64_t j = i; j < i + h; j += L) {
                const V a = V::load(x + j), b = V::load(x + j + h), c = V::load(x + j + 2 * h), d = V::load(x + j + 3 * h);
                const V ab = a + b, a_b = a - b, cd = c + d, c_d = c - d;
                (ab + cd).store(x + j);
                (a_b + c_d).store(x + j + h);
                (ab - cd).store(x + j + 2 * h);
                (a_b - c_d).store(x + j + 3 * h);
            }
        }
    }
    if (h < n) {
        for (int64_t j = 0; j < h; j += L) {
            const V a = V::load(x + j), b = V::load(x + j + h);
            (a + b).store(x + j);
            (a - b).store(x + j + h);
        }
    }
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
            multiply_outer<V>(from, to, blocks, signs, d, inner);
        }
        signs += d * d;
        blocks *= d;
        float* const done = to;
        to = from;
        from = done;
    }
    if (p.power > 1)
        for (int64_t b = 0; b < blocks; ++b) walsh<V>(from + b * p.power, p.power);
    write_row(p, row, from);
}

}  // namespace
