// Codebooks of vectors: the nearest centroid of a vector, the sweep that rounds the columns of a matrix to centroids while it passes each
// column's error on to the next ones, and the way back from packed codes. A vector is v consecutive rows of one column.
#pragma once

#include <cstdint>

#include "cpu.hpp"

namespace dither {

// Centroids c [k, v], and for each of them |c|^2 / 2: the nearest to x has the least |c|^2 / 2 - x c. Of equal ones the first is taken.
template <class T>
struct Book {
    int64_t size;          // k; 0: no book
    const T* centroids;    // [k, v]
    const T* half_square;  // [k]
};

template <class T>
struct NearestProblem {
    int64_t count, v;
    const T* vectors;  // [count, v]
    Book<T> book;
    int32_t* codes;    // [count]
};

// For the columns j = 0 .. n-1 of X [rows v, n], each row of vectors by itself:
//     x_j = X_j + sum_{i < j} e_i mix_ji,   q_j = the nearest of book 0 (+ the nearest of book 1 to what is left),   e_j = q_j - base_j
// base_j is x_j where no base is given.
template <class T>
struct SweepProblem {
    int64_t rows, columns, v;  // rows of vectors
    const T* values;           // X [rows v, n]
    const T* base;             // [rows v, n] or null
    const T* mix;              // [n, n]; only below the diagonal
    Book<T> books[2];
    int32_t* codes;            // [rows, n]: a, or a + k b with two books
    T* errors;                 // e [rows v, n]
};

template <class T>
using NearestTile = void (*)(const NearestProblem<T>&, int64_t first, int64_t count);  // count vectors, at most as many as lanes
template <class T>
using SweepTile = void (*)(const SweepProblem<T>&, int64_t first, int64_t count, T* scratch);

template <class T>
struct CodebookTiles {
    int64_t lanes;
    NearestTile<T> nearest;
    SweepTile<T> sweep;
    int64_t scratch(int64_t columns, int64_t v) const { return (2 * columns * v + 2 * v) * lanes; }  // numbers that a sweep needs
};

template <class T> CodebookTiles<T> codebook_tiles_scalar();
#ifdef DITHER_X86
template <class T> CodebookTiles<T> codebook_tiles_avx2();
template <class T> CodebookTiles<T> codebook_tiles_avx512();
#endif

template <class T> void codebook_nearest(const NearestProblem<T>&, Isa isa, int threads);
template <class T> void codebook_sweep(const SweepProblem<T>&, Isa isa, int threads);

// Codes of `bits` bits (at most 24), LSB first, rows padded to 4 bytes: the lower `main_bits` name a centroid of book 0, the others of book 1.
// Value of row r v + i in column place[j]: (C[g][code][i] + R[g][code'][i]) scale[place[j]] + bias[place[j]], with g = group[j]. Rows from
// `rows` on are left out.
struct DecodeProblem {
    int64_t rows, columns, count, v;  // of the matrix; codes a row
    int bits, main_bits;
    const uint8_t* packed;
    int64_t stride;
    const float* centroids;   // [G, k, v]
    const float* residuals;   // [G, k2, v] or null
    const uint8_t* group;     // [count] or null
    const int32_t* place;     // [count] or null: j itself
    const float* scale;       // [columns] or null, with bias
    const float* bias;
    void* values;             // [rows, columns], float32 or bfloat16 by its bits
    bool bfloat16;
};

void codebook_decode(const DecodeProblem&, int threads);

}  // namespace dither
