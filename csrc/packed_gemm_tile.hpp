// The products of packed_gemm.hpp, written once for every vector type: V holds V::lanes lanes, a divisor of 16. A tile of M rows of x and N vectors of W
// keeps its sums in registers: for each lane of depth, N loads serve M N products, and each of x, spread over a vector, N.
#pragma once

#include "packed_gemm.hpp"
#include "storage.hpp"

namespace {

constexpr int64_t P = dither::gemm_panel;

template <class V, int M, int N>
void corner(const float* x, const float* panels, int64_t depth, float* sums, int64_t next, bool earlier) {
    constexpr int L = V::lanes, S = P / L;  // vectors a panel
    V sum[M][N];
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 16
        for (int n = 0; n < N; ++n) sum[m][n] = V::set1(0.0f);
    for (int64_t k = 0; k < depth; ++k) {
        V right[N];
#pragma GCC unroll 16
        for (int n = 0; n < N; ++n) right[n] = V::load(panels + n / S * depth * P + k * P + n % S * L);
#pragma GCC unroll 16
        for (int m = 0; m < M; ++m) {
            const V left = V::set1(x[m * depth + k]);
#pragma GCC unroll 16
            for (int n = 0; n < N; ++n) sum[m][n] = V::fmadd(left, right[n], sum[m][n]);
        }
    }
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 16
        for (int n = 0; n < N; ++n) {
            float* const to = sums + m * next + n * L;
            (earlier ? V::load(to) + sum[m][n] : sum[m][n]).store(to);
        }
}

// the last rows of x, fewer than M + 1
template <class V, int M, int N>
void rest(int64_t tokens, const float* x, const float* panels, int64_t depth, float* sums, int64_t next, bool earlier) {
    if constexpr (M > 0) {
        if (tokens == M) return corner<V, M, N>(x, panels, depth, sums, next, earlier);
        rest<V, M - 1, N>(tokens, x, panels, depth, sums, next, earlier);
    }
}

template <class V, int M, int N>
void column(const float* x, int64_t tokens, const float* panels, int64_t depth, float* sums, int64_t next, bool earlier) {
    for (; tokens >= M; tokens -= M, x += M * depth, sums += M * next) corner<V, M, N>(x, panels, depth, sums, next, earlier);
    rest<V, M - 1, N>(tokens, x, panels, depth, sums, next, earlier);
}

// `most` panels at a time, so most S vectors
template <class V, int M, int most>
void tile(const float* x, int64_t tokens, const float* panels, int64_t count, int64_t depth, float* sums, int64_t next, bool earlier) {
    if (count == most) return column<V, M, most * P / V::lanes>(x, tokens, panels, depth, sums, next, earlier);
    if constexpr (most > 1) tile<V, M, most - 1>(x, tokens, panels, count, depth, sums, next, earlier);
}

// `sums` may be read up to the next multiple of 16
template <class T>
void finish_as(const float* sums, int64_t count, T* y) {
    constexpr int64_t L = decltype(load(sums))::lanes;
    int64_t j = 0;
    for (; j + L <= count; j += L) store(y + j, load(sums + j));
    if (j < count) store_first(y + j, load(sums + j), count - j);
}

inline void finish(const float* sums, int64_t count, void* y, bool bfloat16) {
    if (bfloat16)
        finish_as(sums, count, static_cast<dither::BFloat16*>(y));
    else
        finish_as(sums, count, static_cast<float*>(y));
}

}  // namespace
