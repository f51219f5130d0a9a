// Rows times a matrix of +-1 from the outside: to[i, :] = sum_j signs[j, i] from[j, :], written once for every vector type. Sums run over j in
// order, and a product with +-1 is exact, so all instruction sets give the same bits.
#pragma once

#include <cstdint>

namespace {

// M rows i at once; the last vector overlaps the one before it, so `width` is at least the lanes of a vector, and from and to are apart
template <class V, int M>
void multiply_outer_of(const typename V::Real* from, int64_t from_stride, typename V::Real* to, int64_t to_stride,
                       const typename V::Real* signs, int64_t d, int64_t width) {
    constexpr int L = V::lanes;
    for (int64_t c = 0; c < width; c += L) {
        const int64_t at = c + L <= width ? c : width - L;
        V sum[M];
#pragma GCC unroll 16
        for (int m = 0; m < M; ++m) sum[m] = V::set1(0);
        for (int64_t j = 0; j < d; ++j) {
            const V x = V::load(from + j * from_stride + at);
#pragma GCC unroll 16
            for (int m = 0; m < M; ++m) sum[m] = V::fmadd(V::set1(signs[j * d + m]), x, sum[m]);
        }
#pragma GCC unroll 16
        for (int m = 0; m < M; ++m) sum[m].store(to + m * to_stride + at);
    }
}

// [d, width] at `from` to [d, width] at `to`
template <class V>
void multiply_outer(const typename V::Real* from, int64_t from_stride, typename V::Real* to, int64_t to_stride,
                    const typename V::Real* signs, int64_t d, int64_t width) {
    int64_t i = 0;
    for (; i + 12 <= d; i += 12) multiply_outer_of<V, 12>(from, from_stride, to + i * to_stride, to_stride, signs + i, d, width);
    for (; i + 4 <= d; i += 4) multiply_outer_of<V, 4>(from, from_stride, to + i * to_stride, to_stride, signs + i, d, width);
    for (; i < d; ++i) multiply_outer_of<V, 1>(from, from_stride, to + i * to_stride, to_stride, signs + i, d, width);
}

}  // namespace
