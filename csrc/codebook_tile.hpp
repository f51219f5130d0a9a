// The tiles of codebook.hpp, written once for every vector type: a lane is a vector of the matrix. Centroids are broadcast, so a search costs
// v multiply-adds and three more operations for each centroid and lanes vectors.
#pragma once

#include <cstring>

#include "codebook.hpp"

namespace {

using dither::Book;
using dither::NearestProblem;
using dither::SweepProblem;

// |c|^2 / 2 - x c for the lanes of x, in registers (`own`, v = fixed) or in memory.
template <class V, int fixed>
V distance(const V* own, const typename V::Real* x, int64_t v, const typename V::Real* c, typename V::Real half_square) {
    V d = V::set1(half_square);
    if constexpr (fixed > 0)
        for (int i = 0; i < fixed; ++i) d = V::fnmadd(own[i], V::set1(c[i]), d);
    else
        for (int64_t i = 0; i < v; ++i) d = V::fnmadd(V::load(x + i * V::lanes), V::set1(c[i]), d);
    return d;
}

// Index of the nearest centroid to x [v][lanes], as a number of V's type. `fixed`: v, where the compiler is to know it; else 0. Four centroids
// are taken at a time, each against the best of its own four, so that comparisons need not wait for one another.
template <class V, int fixed>
V search_fixed(const typename V::Real* x, int64_t v, const Book<typename V::Real>& book) {
    using T = typename V::Real;
    constexpr int ways = 4;
    V own[fixed ? fixed : 1];
    if constexpr (fixed > 0)
        for (int i = 0; i < fixed; ++i) own[i] = V::load(x + i * V::lanes);
    const auto at = [&](int64_t k) { return distance<V, fixed>(own, x, v, book.centroids + k * v, book.half_square[k]); };
    V best[ways], index[ways];
    for (int w = 0; w < ways; ++w) {  // a short book fills up with its first centroid
        const int64_t k = w < book.size ? w : 0;
        best[w] = at(k);
        index[w] = V::set1(static_cast<T>(k));
    }
    V now = V::set1(T(0));
    const V step = V::set1(T(ways));
    int64_t k = ways;
    for (; k + ways <= book.size; k += ways) {
        now = now + step;
        for (int w = 0; w < ways; ++w) {
            const V d = at(k + w);
            index[w] = V::select_lt(d, best[w], now + V::set1(T(w)), index[w]);
            best[w] = V::min(d, best[w]);
        }
    }
    for (int w = 0; k < book.size; ++k, ++w) {
        const V d = at(k);
        index[w] = V::select_lt(d, best[w], V::set1(static_cast<T>(k)), index[w]);
        best[w] = V::min(d, best[w]);
    }
    for (int w = 1; w < ways; ++w) {  // of equal ones the first
        const V first = V::select_lt(index[w], index[0], index[w], index[0]);
        index[0] = V::select_lt(best[w], best[0], index[w], V::select_lt(best[0], best[w], index[0], first));
        best[0] = V::min(best[w], best[0]);
    }
    return index[0];
}

template <class V>
V search(const typename V::Real* x, int64_t v, const Book<typename V::Real>& book) {
    switch (v) {
        case 1: return search_fixed<V, 1>(x, v, book);
        case 2: return search_fixed<V, 2>(x, v, book);
        case 3: return search_fixed<V, 3>(x, v, book);
        case 4: return search_fixed<V, 4>(x, v, book);
        case 5: return search_fixed<V, 5>(x, v, book);
        case 6: return search_fixed<V, 6>(x, v, book);
        case 8: return search_fixed<V, 8>(x, v, book);
        default: return search_fixed<V, 0>(x, v, book);
    }
}

// Lanes from `count` on search for the zero vector, and are not stored.
template <class V>
void nearest_tile(const NearestProblem<typename V::Real>& p, int64_t first, int64_t count) {
    using T = typename V::Real;
    constexpr int L = V::lanes;
    constexpr int64_t few = 32;
    T small[few * L], found[L];
    T* const x = p.v <= few ? small : new T[p.v * L];
    for (int64_t l = 0; l < L; ++l)
        for (int64_t i = 0; i < p.v; ++i) x[i * L + l] = l < count ? p.vectors[(first + l) * p.v + i] : T(0);
    search<V>(x, p.v, p.book).store(found);
    for (int64_t l = 0; l < count; ++l) p.codes[first + l] = static_cast<int32_t>(found[l]);
    if (x != small) delete[] x;
}

// x[i] += sum_{j < n} e[j][i] mix[j] for `panel` entries i; e [n][v][lanes]
template <class V, int panel>
void gather(const typename V::Real* e, const typename V::Real* mix, int64_t n, int64_t v, typename V::Real* x) {
    constexpr int L = V::lanes;
    V even[panel], odd[panel];  // two chains, so that one need not wait for the other
    for (int i = 0; i < panel; ++i) even[i] = V::load(x + i * L), odd[i] = V::set1(0);
    int64_t j = 0;
    for (; j + 1 < n; j += 2) {
        const V a = V::set1(mix[j]), b = V::set1(mix[j + 1]);
        for (int i = 0; i < panel; ++i) {
            even[i] = V::fmadd(V::load(e + (j * v + i) * L), a, even[i]);
            odd[i] = V::fmadd(V::load(e + ((j + 1) * v + i) * L), b, odd[i]);
        }
    }
    if (j < n)
        for (int i = 0; i < panel; ++i) even[i] = V::fmadd(V::load(e + (j * v + i) * L), V::set1(mix[j]), even[i]);
    for (int i = 0; i < panel; ++i) (even[i] + odd[i]).store(x + i * L);
}

template <class V>
void sweep_tile(const SweepProblem<typename V::Real>& p, int64_t first, int64_t count, typename V::Real* scratch) {
    using T = typename V::Real;
    constexpr int L = V::lanes;
    const int64_t v = p.v, n = p.columns, size = v * L;
    T* const errors = scratch;               // [n][v][L]: X until its column is reached
    T* const base = errors + n * size;       // [n][v][L]
    T* const x = base + n * size;            // [v][L]
    T* const q = x + size;                   // [v][L]
    const auto stage = [&](const T* from, T* to) {
        for (int64_t l = 0; l < L; ++l)
            for (int64_t i = 0; i < v; ++i) {
                const T* const row = from + ((first + l) * v + i) * n;
                for (int64_t j = 0; j < n; ++j) to[j * size + i * L + l] = l < count ? row[j] : T(0);
            }
    };
    stage(p.values, errors);
    if (p.base) stage(p.base, base);

    for (int64_t j = 0; j < n; ++j) {
        T* const e = errors + j * size;
        const T* const mix = p.mix + j * n;
        std::memcpy(x, e, size * sizeof(T));
        int64_t i = 0;
        for (; i + 4 <= v; i += 4) gather<V, 4>(errors + i * L, mix, j, v, x + i * L);
        for (; i + 2 <= v; i += 2) gather<V, 2>(errors + i * L, mix, j, v, x + i * L);
        if (i < v) gather<V, 1>(errors + i * L, mix, j, v, x + i * L);

        const T* const from = p.base ? base + j * size : x;
        int32_t code[L];
        T found[L];
        std::memset(q, 0, size * sizeof(T));
        for (int b = 0; b < 2 && p.books[b].size; ++b) {
            if (b)  // what the first left over; e is free to hold it
                for (int64_t at = 0; at < size; at += L) (V::load(x + at) - V::load(q + at)).store(e + at);
            search<V>(b ? e : x, v, p.books[b]).store(found);
            for (int l = 0; l < L; ++l) {
                const int64_t chosen = static_cast<int64_t>(found[l]);
                const T* const c = p.books[b].centroids + chosen * v;
                for (int64_t at = 0; at < v; ++at) q[at * L + l] += c[at];
                code[l] = static_cast<int32_t>(b ? code[l] + chosen * p.books[0].size : chosen);
            }
        }
        for (int64_t at = 0; at < size; at += L) (V::load(q + at) - V::load(from + at)).store(e + at);
        for (int64_t l = 0; l < count; ++l) p.codes[(first + l) * n + j] = code[l];
    }
    for (int64_t l = 0; l < count; ++l)
        for (int64_t i = 0; i < v; ++i) {
            T* const row = p.errors + ((first + l) * v + i) * n;
            for (int64_t j = 0; j < n; ++j) row[j] = errors[j * size + i * L + l];
        }
}

template <class V>
dither::CodebookTiles<typename V::Real> codebook_tiles() {
    return {V::lanes, nearest_tile<V>, sweep_tile<V>};
}

}  // namespace
