// The tile of gram.hpp, written once for every vector type, and the packing of rows.
#pragma once

#include <cstring>

#include "gram.hpp"

namespace {

constexpr int64_t P = dither::panel_columns;

inline float widen(uint16_t bfloat16) {
    const uint32_t bits = static_cast<uint32_t>(bfloat16) << 16;
    float f;
    std::memcpy(&f, &bits, 4);
    return f;
}

inline void pack_float32(const void* x, int64_t depth, int64_t columns, int64_t c, float* to) {
    const float* from = static_cast<const float*>(x) + c;
    const int64_t width = columns - c < P ? columns - c : P;
    for (int64_t k = 0; k < depth; ++k, from += columns, to += P) {
        if (width == P) {
            std::memcpy(to, from, sizeof(float) * P);
        } else {
            for (int64_t j = 0; j < P; ++j) to[j] = j < width ? from[j] : 0.0f;
        }
    }
}

inline void pack_bfloat16(const void* x, int64_t depth, int64_t columns, int64_t c, float* to) {
    const uint16_t* from = static_cast<const uint16_t*>(x) + c;
    const int64_t width = columns - c < P ? columns - c : P;
    for (int64_t k = 0; k < depth; ++k, from += columns, to += P) {
        if (width == P) {
            for (int64_t j = 0; j < P; ++j) to[j] = widen(from[j]);
        } else {
            for (int64_t j = 0; j < P; ++j) to[j] = j < width ? widen(from[j]) : 0.0f;
        }
    }
}

// V::lanes divides 16; M rows and N panels of sums stay in registers
template <class V, int M, int N>
void tile_of(const float* a, const float* b, int64_t panel_stride, int64_t depth, double* h, int64_t ld, int64_t rows, int64_t cols) {
    constexpr int L = V::lanes, S = P / L;  // vectors a panel
    V sum[M][N * S];
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 16
        for (int n = 0; n < N * S; ++n) sum[m][n] = V::set1(0.0f);

    for (int64_t k = 0; k < depth; ++k, a += P, b += P) {
        V right[N * S];
#pragma GCC unroll 16
        for (int n = 0; n < N * S; ++n) right[n] = V::load(b + (n / S) * panel_stride + (n % S) * L);
#pragma GCC unroll 16
        for (int m = 0; m < M; ++m) {
            const V left = V::set1(a[m]);
#pragma GCC unroll 16
            for (int n = 0; n < N * S; ++n) sum[m][n] = V::fmadd(left, right[n], sum[m][n]);
        }
    }

    float sums[M][N * P];
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 16
        for (int n = 0; n < N * S; ++n) sum[m][n].store(&sums[m][n * L]);
    for (int64_t m = 0; m < rows; ++m)
        for (int64_t j = 0; j < cols; ++j) h[m * ld + j] += static_cast<double>(sums[m][j]);
}

template <class V, int M, int N>
void tile(const float* a, const float* b, int64_t panel_stride, int64_t depth, double* h, int64_t ld, int64_t rows, int64_t cols) {
    const int64_t panels = (cols + P - 1) / P;
    if constexpr (N >= 3) {
        if (panels == 3) return tile_of<V, M, 3>(a, b, panel_stride, depth, h, ld, rows, cols);
    }
    if constexpr (N >= 2) {
        if (panels == 2) return tile_of<V, M, 2>(a, b, panel_stride, depth, h, ld, rows, cols);
    }
    return tile_of<V, M, 1>(a, b, panel_stride, depth, h, ld, rows, cols);
}

template <class V, int M, int N>
dither::GramKernel gram_kernel(dither::RowType type) {
    return {M, N, 1, type == dither::RowType::float32 ? pack_float32 : pack_bfloat16, tile<V, M, N>};
}

}  // namespace
