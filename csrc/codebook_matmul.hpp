// y[t, o] (+)= sum_j w[o, j] x[t, j] for a few tokens, with w read as packed indices of vectors (codebook.hpp, `DecodeProblem`): v consecutive outputs of
// one input j are one entry of a book, so an index takes one multiply-add of a vector with a number, and w is never written anywhere:
//     y[r v .. r v + v - 1] = sum_j x_j scale_j (C[g][code_rj] + R[g][code'_rj])  +  sum_j x_j bias_j
//
// The sums could be cut the other way, gathering for each entry the inputs that name it, h_a = sum_{j: code_rj = a} x_j, and then sum_a h_a C[a]: N
// additions and k v multiply-adds a row of vectors and token, instead of N v multiply-adds. But a register does 16 of the latter at once, so both take
// about one step an index, and the additions write memory: that could only pay for vectors longer than a register. A table of x_j C[a], for all a,
// would save nothing: looking a product up and adding it costs what looking the entry up and multiplying it does.
#pragma once

#include <cstdint>

#include "cpu.hpp"

namespace dither {

struct CodebookMatmul {
    int64_t rows, columns, count, v;  // of the matrix; codes a row
    int bits, main_bits;
    const uint8_t* packed;  // [ceil(rows / v), stride]
    int64_t stride;
    int64_t width;           // floats from one entry to the next: v, and zeros up to 4, 8 or a multiple of 16
    const float* centroids;  // [G, k, width]
    const float* residuals;  // [G, k2, width] or null
    const uint8_t* group;    // [count] or null
    const int32_t* place;    // [count] or null: j itself
    const float* scale;      // [columns] or null, with bias
    const float* bias;
    int64_t tokens;
    const float* x;  // [T, columns]
    bool add;        // to what y holds
    float* y;        // [T, rows]
    // made by `codebook_matmul`:
    const float* ready;   // x scale in the order of codes, in tiles of tokens (`tile_of`): [tile][count][tokens of the tile]
    const float* offset;  // [T]: sum of x bias
};

inline constexpr int64_t book_rows = 4, book_columns = 256;  // rows of vectors, and codes of each, that are unpacked at a time

// Tokens that are multiplied at once, with zeros for those that are missing.
inline constexpr int64_t tile_of(int64_t left) { return left > 4 ? 8 : left > 1 ? 4 : 1; }
inline constexpr int64_t tiled(int64_t tokens) { return tokens / 8 * 8 + (tokens % 8 ? tile_of(tokens % 8) : 0); }

using CodebookRows = void (*)(const CodebookMatmul&, int64_t first, int64_t last, float* totals);  // of vectors; totals: [tiled(T), book_rows, width]

CodebookRows codebook_rows_scalar(int64_t width);
#ifdef DITHER_X86
CodebookRows codebook_rows_avx2(int64_t width);
CodebookRows codebook_rows_avx512(int64_t width);
#endif

void codebook_matmul(CodebookMatmul, Isa isa, int threads);

}  // namespace dither
