// Walsh-Hadamard transforms in place, written once for every vector type: distances 1, 2, 4, ... in this order, x[i] and x[i + distance] become
// their sum and difference. How many levels one pass takes changes no bit of the result, so all instruction sets agree.
#pragma once

#include <cstdint>

namespace {

// Levels that a pass keeps in registers: 16 vectors of 32 registers, or 8 of 16.
template <class V>
constexpr int most_levels = V::panel > 6 ? 4 : 3;

constexpr int64_t near_bytes = 1 << 15;  // what is transformed at once: fits the first cache of every processor, 32 KiB and up

// x[i] +- x[i ^ distance] within a vector
template <class V, int distance>
V butterfly(V x) {
    typename V::Real signs[V::lanes];
    for (int i = 0; i < V::lanes; ++i) signs[i] = i & distance ? -1 : 1;
    return V::fmadd(x, V::load(signs), V::template exchange<distance>(x));
}

// The distances first .. end / 2 within a vector
template <class V>
V within(V x, int64_t first, int64_t end) {
    if (first <= 1 && end > 1) x = butterfly<V, 1>(x);
    if (first <= 2 && end > 2) x = butterfly<V, 2>(x);
    if constexpr (V::lanes > 4)
        if (first <= 4 && end > 4) x = butterfly<V, 4>(x);
    if constexpr (V::lanes > 8)
        if (first <= 8 && end > 8) x = butterfly<V, 8>(x);
    return x;
}

// The transform of 2^levels vectors
template <class V, int levels>
void turn(V* v) {
#pragma GCC unroll 4
    for (int level = 0; level < levels; ++level) {
#pragma GCC unroll 16
        for (int i = 0; i < 1 << levels; ++i) {
            if (i >> level & 1) continue;
            const V a = v[i], b = v[i + (1 << level)];
            v[i] = a + b;
            v[i + (1 << level)] = a - b;
        }
    }
}

// x[0 .. n) times `scale`, then the distances first .. (lanes << levels) / 2
template <class V, int levels, bool scaled>
void start(typename V::Real* x, int64_t n, int64_t first, typename V::Real scale) {
    constexpr int L = V::lanes, count = 1 << levels;
    for (int64_t i = 0; i < n; i += count * L) {
        V v[count];
#pragma GCC unroll 16
        for (int k = 0; k < count; ++k) {
            v[k] = V::load(x + i + k * L);
            if (scaled) v[k] = v[k] * V::set1(scale);
            v[k] = within(v[k], first, L);
        }
        turn<V, levels>(v);
#pragma GCC unroll 16
        for (int k = 0; k < count; ++k) v[k].store(x + i + k * L);
    }
}

// 2^levels rows of `width` numbers, transformed along the rows. `from` and `to` may be one, unless `streamed` past the caches.
template <class V, int levels, bool streamed>
void pass(const typename V::Real* from, int64_t from_stride, typename V::Real* to, int64_t to_stride, int64_t width) {
    constexpr int L = V::lanes, count = 1 << levels;
    for (int64_t j = 0; j < width; j += L) {
        V v[count];
#pragma GCC unroll 16
        for (int k = 0; k < count; ++k) v[k] = V::load(from + k * from_stride + j);
        turn<V, levels>(v);
#pragma GCC unroll 16
        for (int k = 0; k < count; ++k) {
            if (streamed) v[k].stream(to + k * to_stride + j);
            else v[k].store(to + k * to_stride + j);
        }
    }
}

template <class V, bool streamed = false>
void pass(int levels, const typename V::Real* from, int64_t from_stride, typename V::Real* to, int64_t to_stride, int64_t width) {
    if (levels == 1) pass<V, 1, streamed>(from, from_stride, to, to_stride, width);
    if (levels == 2) pass<V, 2, streamed>(from, from_stride, to, to_stride, width);
    if (levels == 3) pass<V, 3, streamed>(from, from_stride, to, to_stride, width);
    if constexpr (most_levels<V> > 3)
        if (levels == 4) pass<V, 4, streamed>(from, from_stride, to, to_stride, width);
}

template <class V, bool scaled>
void start(int levels, typename V::Real* x, int64_t n, int64_t first, typename V::Real scale) {
    if (levels == 0) start<V, 0, scaled>(x, n, first, scale);
    if (levels == 1) start<V, 1, scaled>(x, n, first, scale);
    if (levels == 2) start<V, 2, scaled>(x, n, first, scale);
    if (levels == 3) start<V, 3, scaled>(x, n, first, scale);
    if constexpr (most_levels<V> > 3)
        if (levels == 4) start<V, 4, scaled>(x, n, first, scale);
}

inline int log2_of(int64_t n) { return 63 - __builtin_clzll(static_cast<uint64_t>(n)); }

// How many of the `left` levels the next pass takes: as few passes as can be, of about the same size
template <class V>
int next_levels(int left) {
    const int passes = (left + most_levels<V> - 1) / most_levels<V>;
    return (left + passes - 1) / passes;
}

// x[0 .. n) times `scale`, transformed over the distances first .. n / 2. n and first are powers of two, n at least the lanes of a vector.
template <class V>
void walsh(typename V::Real* x, int64_t n, int64_t first, typename V::Real scale) {
    using Real = typename V::Real;
    constexpr int64_t most = near_bytes / sizeof(Real);
    const int64_t near = n < most ? n : most;
    const int inside = log2_of(near / V::lanes), begin = inside < most_levels<V> ? inside : most_levels<V>;
    const auto climb = [](Real* block, int64_t size, int64_t h) {
        while (h < size) {
            const int levels = next_levels<V>(log2_of(size / h));
            for (int64_t i = 0; i < size; i += h << levels) pass<V>(levels, block + i, h, block + i, h, h);
            h <<= levels;
        }
    };
    for (int64_t i = 0; i < n; i += near) {
        if (scale == Real(1)) start<V, false>(begin, x + i, near, first, scale);
        else start<V, true>(begin, x + i, near, first, scale);
        climb(x + i, near, static_cast<int64_t>(V::lanes) << begin);
    }
    climb(x, n, near);
}

}  // namespace
