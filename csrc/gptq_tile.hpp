// The loop of gptq.hpp on one tile of rows, written once for every vector type. The tile lies transposed: a vector holds one
// column of `lanes` rows, so that the factor's entries are broadcast. A panel of columns stays in registers while the errors of
// all earlier columns stream past, and is then solved in place.
#pragma once

#include "gptq.hpp"

namespace {

using dither::GptqProblem;
using dither::GridKind;

constexpr int tile_vectors = 2;

template <class V>
constexpr int tile_rows = tile_vectors * V::lanes;

// Grids: quantize(w, r) stores the codes of row vector r and returns the values. Only the mixed one has levels, and finds its mask
// where the codes go.
template <class V>
struct Affine {
    using T = typename V::Real;
    V scale[tile_vectors], zero[tile_vectors], code_max;
    Affine(const GptqProblem<T>& p, const T* s, const T* z, const T*) : code_max(V::set1(p.code_max)) {
        for (int r = 0; r < tile_vectors; ++r) scale[r] = V::load(s + r * V::lanes), zero[r] = V::load(z + r * V::lanes);
    }
    V quantize(V w, int r, uint8_t* codes) const {
        const V code = V::clamp(V::round(w / scale[r]) + zero[r], V::set1(T(0)), code_max);
        code.store_codes(codes);
        return scale[r] * (code - zero[r]);
    }
};

template <class V>
struct Offset {
    using T = typename V::Real;
    V scale[tile_vectors], offset[tile_vectors], code_max;
    Offset(const GptqProblem<T>& p, const T* s, const T* m, const T*) : code_max(V::set1(p.code_max)) {
        for (int r = 0; r < tile_vectors; ++r) scale[r] = V::load(s + r * V::lanes), offset[r] = V::load(m + r * V::lanes);
    }
    V quantize(V w, int r, uint8_t* codes) const {
        const V code = V::clamp(V::round((w - offset[r]) / scale[r]), V::set1(T(0)), code_max);
        code.store_codes(codes);
        return scale[r] * code + offset[r];
    }
};

template <class V>
struct Table {
    using T = typename V::Real;
    const GptqProblem<T>& problem;
    V scale[tile_vectors];
    Table(const GptqProblem<T>& p, const T* s, const T*, const T*) : problem(p) {
        for (int r = 0; r < tile_vectors; ++r) scale[r] = V::load(s + r * V::lanes);
    }
    V quantize(V w, int r, uint8_t* codes) const {
        const V x = w / scale[r];
        V index = V::set1(T(0));
        for (int64_t i = 0; i + 1 < problem.table_size; ++i) index = V::add_where_ge(index, x, V::set1(problem.edges[i]));
        T entry[V::lanes];
        index.store(entry);
        for (int l = 0; l < V::lanes; ++l) {
            const int i = static_cast<int>(entry[l]);
            codes[l] = problem.table_codes[i];
            entry[l] = problem.table[i];
        }
        return scale[r] * V::load(entry);
    }
};

// Both rules are computed and one is taken, exactly: every value is finite, and is multiplied by 0 or 1.
template <class V>
struct Mixed {
    using T = typename V::Real;
    Affine<V> affine;
    const T* levels;  // [3, R]
    Mixed(const GptqProblem<T>& p, const T* s, const T* z, const T* l) : affine(p, s, z, l), levels(l) {}
    V quantize(V w, int r, uint8_t* codes) const {
        constexpr int R = tile_rows<V>;
        T mask[V::lanes];
        for (int l = 0; l < V::lanes; ++l) mask[l] = static_cast<T>(codes[l]);
        const V one = V::set1(T(1)), binary = V::load(mask), high = one - binary;
        const T* const own = levels + r * V::lanes;
        const V up = V::add_where_ge(V::set1(T(0)), w, V::load(own));
        const V code = V::clamp(V::round(w / affine.scale[r]) + affine.zero[r], V::set1(T(0)), affine.code_max);
        (binary * up + high * code).store_codes(codes);
        const V level = (one - up) * V::load(own + R) + up * V::load(own + 2 * R);
        return binary * level + high * (affine.scale[r] * (code - affine.zero[r]));
    }
};

// to[c, r] = from[r, c] for a row-major `from`; lanes beyond `rows` are filled so that they stay harmless
template <class V, class T>
void transpose_in(const T* from, int64_t rows, int64_t columns, T fill, T* to) {
    constexpr int R = tile_rows<V>;
    for (int64_t c0 = 0; c0 < columns; c0 += 16) {
        const int64_t c1 = c0 + 16 < columns ? c0 + 16 : columns;
        for (int64_t r = 0; r < R; ++r)
            for (int64_t c = c0; c < c1; ++c) to[c * R + r] = r < rows ? from[r * columns + c] : fill;
    }
}

template <class V, class T>
void transpose_out(const T* from, int64_t rows, int64_t columns, T* to) {
    constexpr int R = tile_rows<V>;
    for (int64_t c0 = 0; c0 < columns; c0 += 16) {
        const int64_t c1 = c0 + 16 < columns ? c0 + 16 : columns;
        for (int64_t r = 0; r < rows; ++r)
            for (int64_t c = c0; c < c1; ++c) to[r * columns + c] = from[c * R + r];
    }
}

template <class V, template <class> class Grid>
void solve_tile(const GptqProblem<typename V::Real>& p, int64_t first_row, char* scratch) {
    using T = typename V::Real;
    constexpr int R = tile_rows<V>, L = V::lanes, N = V::panel;
    const int64_t I = p.columns, G = p.groups;
    const int64_t rows = p.rows - first_row < R ? p.rows - first_row : R;

    T* const state = reinterpret_cast<T*>(scratch);  // [I, R]: W's columns, replaced by the errors e as they are known
    T* const scale = state + I * R;                  // [G, R]
    T* const shift = scale + G * R;                  // [G, R]
    T* const levels = shift + G * R;               // [G, 3, R], mixed grids only
    const bool mixed = p.kind == GridKind::mixed;
    uint8_t* const codes = reinterpret_cast<uint8_t*>(levels + (mixed ? 3 * G * R : 0));  // [I, R]; before, where the grid is binary

    transpose_in<V>(p.weight + first_row * I, rows, I, T(0), state);
    transpose_in<V>(p.scale + first_row * G, rows, G, T(1), scale);
    if (p.kind != GridKind::table) transpose_in<V>(p.shift + first_row * G, rows, G, T(0), shift);

    if (mixed) {
        transpose_in<V>(p.levels + first_row * 3 * G, rows, 3 * G, T(0), levels);
        transpose_in<V>(p.binary + first_row * I, rows, I, uint8_t(0), codes);
    }

    double loss[R] = {};
    for (int64_t c0 = 0; c0 < I; c0 += N) {
        const int64_t width = I - c0 < N ? I - c0 : N;
        const T* u = p.packed_factor + dither::panel_offset(c0 / N, N);

        V w[N][tile_vectors];
#pragma GCC unroll 16
        for (int j = 0; j < N; ++j)
#pragma GCC unroll 2
            for (int r = 0; r < tile_vectors; ++r) w[j][r] = j < width ? V::load(state + (c0 + j) * R + r * L) : V::set1(T(0));

        for (int64_t k = 0; k < c0; ++k, u += N) {
            V e[tile_vectors];
#pragma GCC unroll 2
            for (int r = 0; r < tile_vectors; ++r) e[r] = V::load(state + k * R + r * L);
#pragma GCC unroll 16
            for (int j = 0; j < N; ++j) {
                const V ukj = V::set1(u[j]);
#pragma GCC unroll 2
                for (int r = 0; r < tile_vectors; ++r) w[j][r] = V::fnmadd(e[r], ukj, w[j][r]);
            }
        }

        V squares[tile_vectors] = {V::set1(T(0)), V::set1(T(0))};
#pragma GCC unroll 16
        for (int j = 0; j < N; ++j, u += N) {
            if (j >= width) break;
            const int64_t c = c0 + j, g = p.column_group[c];
            const Grid<V> grid(p, scale + g * R, shift + g * R, mixed ? levels + g * 3 * R : nullptr);
            const V diagonal = V::set1(u[j]);
#pragma GCC unroll 2
            for (int r = 0; r < tile_vectors; ++r) {
                const V e = (w[j][r] - grid.quantize(w[j][r], r, codes + c * R + r * L)) / diagonal;
                e.store(state + c * R + r * L);
                squares[r] = V::fmadd(e, e, squares[r]);
#pragma GCC unroll 16
                for (int i = j + 1; i < N; ++i) w[i][r] = V::fnmadd(e, V::set1(u[i]), w[i][r]);
            }
        }
        for (int r = 0; r < tile_vectors; ++r) {  // float only within a panel
            T sums[L];
            squares[r].store(sums);
            for (int l = 0; l < L; ++l) loss[r * L + l] += 0.5 * static_cast<double>(sums[l]);
        }
    }

    transpose_out<V>(codes, rows, I, p.codes + first_row * I);
    if (p.errors) transpose_out<V>(state, rows, I, p.errors + first_row * I);
    for (int64_t r = 0; r < rows; ++r) p.loss[first_row + r] = loss[r];
}

template <class V>
void tile(const GptqProblem<typename V::Real>& p, int64_t first_row, char* scratch) {
    switch (p.kind) {
        case GridKind::affine: return solve_tile<V, Affine>(p, first_row, scratch);
        case GridKind::offset: return solve_tile<V, Offset>(p, first_row, scratch);
        case GridKind::table: return solve_tile<V, Table>(p, first_row, scratch);
        case GridKind::mixed: return solve_tile<V, Mixed>(p, first_row, scratch);
    }
}

template <class V>
dither::GptqKernel<typename V::Real> kernel() {
    return {tile<V>, tile_rows<V>, V::panel};
}

}  // namespace
