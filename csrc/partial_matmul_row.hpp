// Rows of partial_matmul.hpp, written once for every vector type: a row is decoded into scratch, which stays in the caches, and meets all tokens.
#pragma once

#include "partial_matmul.hpp"
#include "partial_row.hpp"

namespace {

template <class V>
float dot(const float* w, const float* x, int64_t n) {
    constexpr int L = V::lanes;
    V a = V::set1(0), b = a, c = a, d = a;
    int64_t i = 0;
    for (; i + 4 * L <= n; i += 4 * L) {
        a = V::fmadd(V::load(w + i), V::load(x + i), a);
        b = V::fmadd(V::load(w + i + L), V::load(x + i + L), b);
        c = V::fmadd(V::load(w + i + 2 * L), V::load(x + i + 2 * L), c);
        d = V::fmadd(V::load(w + i + 3 * L), V::load(x + i + 3 * L), d);
    }
    for (; i + L <= n; i += L) a = V::fmadd(V::load(w + i), V::load(x + i), a);
    float lanes[L], total = 0;
    ((a + b) + (c + d)).store(lanes);
    for (float lane : lanes) total += lane;
    for (; i < n; ++i) total += w[i] * x[i];
    return total;
}

template <class Levels, class V>
void partial_rows(const dither::PartialMatmul& p, int64_t first, int64_t last, float* scratch) {
    const int64_t columns = p.weights.columns;
    for (int64_t o = first; o < last; ++o) {
        decode_row<Levels>(p.weights, o, scratch);
        for (int64_t t = 0; t < p.tokens; ++t) p.y[t * p.weights.rows + o] = dot<V>(scratch, p.x + t * columns, columns);
    }
}

}  // namespace
