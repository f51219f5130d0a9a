// Rows of codebook_matmul.hpp, written once for every vector type. Indices of four rows and 256 columns become offsets into the books; then a column
// costs a vector of x for every token (or several of them), and for every row a vector of the book (two, with residuals) and a multiply-add.
#pragma once

#include <cstring>

#include "codebook_matmul.hpp"

namespace {

using dither::book_columns;
using dither::book_rows;
using dither::CodebookMatmul;

struct Offsets {
    int32_t main[book_rows][book_columns], residual[book_rows][book_columns];
};

// `count` codes from column j0 on, j0 a multiple of book_columns, so that they begin with a byte. Up to three codes too many are written.
template <bool two>
void unpack(const CodebookMatmul& p, int64_t row, int64_t j0, int64_t count, int32_t* main, int32_t* residual) {
    uint8_t codes[3 * book_columns + 8] = {};
    std::memcpy(codes, p.packed + row * p.stride + j0 * p.bits / 8, (count * p.bits + 7) / 8);
    const uint32_t mask = (1u << p.bits) - 1, main_mask = (1u << p.main_bits) - 1;
    const int32_t width = static_cast<int32_t>(p.width);
    const auto each = [&](int64_t j, uint32_t code) __attribute__((always_inline)) {
        main[j] = static_cast<int32_t>(code & main_mask) * width;
        if constexpr (two) residual[j] = static_cast<int32_t>(code >> p.main_bits) * width;
    };
    if (p.bits == 8) {
        for (int64_t j = 0; j < count; ++j) each(j, codes[j]);
    } else if (p.bits == 16) {
        for (int64_t j = 0; j < count; ++j) each(j, codes[2 * j] | codes[2 * j + 1] << 8);
    } else if (p.bits <= 14) {  // four codes and the bits before them in their byte fit a word
        const int b = p.bits;
        for (int64_t j = 0; j < count; j += 4) {
            const uint32_t bit = static_cast<uint32_t>(j) * static_cast<uint32_t>(b);
            uint64_t word;
            std::memcpy(&word, codes + bit / 8, 8);
            word >>= bit % 8;
            each(j, static_cast<uint32_t>(word) & mask);
            each(j + 1, static_cast<uint32_t>(word >> b) & mask);
            each(j + 2, static_cast<uint32_t>(word >> 2 * b) & mask);
            each(j + 3, static_cast<uint32_t>(word >> 3 * b) & mask);
        }
    } else {
        for (int64_t j = 0; j < count; ++j) {
            uint32_t word;
            std::memcpy(&word, codes + j * p.bits / 8, 4);
            each(j, word >> j * p.bits % 8 & mask);
        }
    }
    if (p.group) {
        const int32_t own = width << p.main_bits, other = width << (p.bits - p.main_bits);
        for (int64_t j = 0; j < count; ++j) main[j] += p.group[j0 + j] * own;
        for (int64_t j = 0; two && j < count; ++j) residual[j] += p.group[j0 + j] * other;
    }
}

// A vector type with one token in its lanes. Others hold an entry several times over, with a token for each.
template <class V>
struct Single {
    static constexpr int lanes = V::lanes, tokens = 1;
    V v;
    static Single zero() { return {V::set1(0)}; }
    static Single entry(const float* p) { return {V::load(p)}; }
    static Single inputs(const float* x) { return {V::set1(*x)}; }
    void store(float* p) const { v.store(p); }
    friend Single operator+(Single a, Single b) { return {a.v + b.v}; }
    static Single fmadd(Single a, Single b, Single c) { return {V::fmadd(a.v, b.v, c.v)}; }
};

// Lanes [l, l + L) of R rows from r0 on, on T tokens; x [count, T]. Sums of a block of columns are added to totals [T, book_rows, width]. Each lane sums
// in the order of columns, however many tokens there are.
template <class V, int R, int T, bool two>
void multiply(const CodebookMatmul& p, const Offsets& offsets, int r0, int64_t count, const float* x, int64_t l, float* totals) {
    constexpr int S = T / V::tokens, L = V::lanes;
    const float *const book = p.centroids + l, *const other = p.residuals + l;
    V sum[R][S];
    for (int r = 0; r < R; ++r)
        for (int s = 0; s < S; ++s) sum[r][s] = V::zero();
    for (int64_t j = 0; j < count; ++j, x += T) {
        V input[S];
        for (int s = 0; s < S; ++s) input[s] = V::inputs(x + s * V::tokens);
        for (int r = 0; r < R; ++r) {
            V entry = V::entry(book + offsets.main[r0 + r][j]);
            if constexpr (two) entry = entry + V::entry(other + offsets.residual[r0 + r][j]);
            for (int s = 0; s < S; ++s) sum[r][s] = V::fmadd(entry, input[s], sum[r][s]);
        }
    }
    for (int r = 0; r < R; ++r)
        for (int s = 0; s < S; ++s) {
            float found[V::tokens * L];
            sum[r][s].store(found);
            for (int t = 0; t < V::tokens; ++t)
                for (int k = 0; k < L; ++k) totals[((s * V::tokens + t) * book_rows + r0 + r) * p.width + l + k] += found[t * L + k];
        }
}

template <class V, int T, bool two>
void tile(const CodebookMatmul& p, const Offsets& offsets, int64_t count, const float* x, int64_t l, float* totals) {
    constexpr int sums = T / V::tokens, held = V::lanes * V::tokens == 16 ? 16 : 8;  // of 32 and of 16 registers
    constexpr int R = sums * 4 <= held ? 4 : held / sums;
    static_assert(book_rows % R == 0);
    for (int r = 0; r < book_rows; r += R) multiply<V, R, T, two>(p, offsets, r, count, x, l, totals);
}

template <class One, class Many, bool two>
void block(const CodebookMatmul& p, const Offsets& offsets, int64_t j0, int64_t count, float* totals) {
    for (int64_t l = 0; l < p.width; l += One::lanes)
        for (int64_t t = 0, some; t < p.tokens; t += some) {
            some = dither::tile_of(p.tokens - t);
            const float* const x = p.ready + t * p.count + j0 * some;
            float* const to = totals + t * book_rows * p.width;
            switch (some) {
                case 8: tile<Many, 8, two>(p, offsets, count, x, l, to); break;
                case 4: tile<Many, 4, two>(p, offsets, count, x, l, to); break;
                default: tile<One, 1, two>(p, offsets, count, x, l, to);
            }
        }
}

template <class One, class Many, bool two>
void all_rows(const CodebookMatmul& p, int64_t first, int64_t last, float* totals) {
    Offsets offsets;
    for (int64_t row = first; row < last; row += book_rows) {
        const int64_t some = last - row < book_rows ? last - row : book_rows;
        std::memset(totals, 0, sizeof(float) * dither::tiled(p.tokens) * book_rows * p.width);
        for (int64_t j = 0; j < p.count; j += book_columns) {
            const int64_t count = p.count - j < book_columns ? p.count - j : book_columns;
            for (int64_t r = 0; r < book_rows; ++r)  // rows that are missing repeat the last one
                unpack<two>(p, row + (r < some ? r : some - 1), j, count, offsets.main[r], offsets.residual[r]);
            block<One, Many, two>(p, offsets, j, count, totals);
        }
        for (int64_t t = 0; t < p.tokens; ++t)
            for (int64_t r = 0; r < some; ++r)
                for (int64_t i = 0; i < p.v && (row + r) * p.v + i < p.rows; ++i) {
                    float& y = p.y[t * p.rows + (row + r) * p.v + i];
                    const float found = totals[(t * book_rows + r) * p.width + i] + p.offset[t];
                    y = p.add ? y + found : found;
                }
    }
}

template <class One, class Many>
void codebook_rows(const CodebookMatmul& p, int64_t first, int64_t last, float* totals) {
    p.residuals ? all_rows<One, Many, true>(p, first, last, totals) : all_rows<One, Many, false>(p, first, last, totals);
}

}  // namespace
