// Rows times a Hadamard matrix D x W, in place, for rows of any length:
//     y = scale x (D x W x I_inner),    n = d power,    D [d, d] of +-1, or none;    W_ij = (-1)^popcount(i & j)
// I_2 keeps real and imaginary parts apart. Levels run in the order of hadamard.hpp, distances 1, 2, 4, ... after D, so both give the same bits.
//
// A row that fits the second cache is read and written once. A longer one takes a pass for blocks of that size, and one for every
// `column_levels` levels above them: tiles of [2^levels, some cache lines] are turned in a buffer. So 2^26 floats take two passes, which is
// 4 x 2^26 x 4 bytes of traffic; the log2(n) n additions take less time than that.
#pragma once

#include <cstdint>

#include "cpu.hpp"

namespace dither {

template <class T>
struct FwhtProblem {
    int64_t rows;   // R
    int64_t d;      // 1: no matrix in front
    int64_t power;  // a power of two, 1 and up
    int64_t inner;  // 1, or 2 for complex numbers
    const T* signs;  // [d, d], a row for each input
    T scale;
    T* x;  // [R, d power inner]
};

inline constexpr int64_t fwht_block_bytes = 1 << 18;   // of the second cache
inline constexpr int64_t fwht_tile_bytes = 1 << 19;    // a tile in its buffer, which the second cache holds too
inline constexpr int64_t fwht_wide_bytes = 1 << 12;    // of a row of a tile at most: a page
inline constexpr int64_t fwht_outer_bytes = 1 << 8;    // of the d rows that the matrix in front takes at once
inline constexpr int fwht_column_levels = 10;
inline constexpr int64_t fwht_cached_bytes = 1 << 25;  // what may stay in the last cache between two passes

template <class T>
struct FwhtLoops {
    int64_t lanes;
    // x[0 .. count) as segments of `end` <= lanes numbers: times scale, distances first .. end / 2
    void (*small)(T* x, int64_t count, int64_t first, int64_t end, T scale);
    // x[0 .. n), n >= lanes: times scale, distances first .. n / 2
    void (*block)(T* x, int64_t n, int64_t first, T scale);
    // columns [from, to) of [2^levels, stride]; buffer of fwht_tile_bytes; streamed: past the caches, x aligned to a line
    void (*columns)(T* x, int64_t stride, int levels, int64_t from, int64_t to, bool streamed, T* buffer);
    // columns [from, to) of [d, stride] times scale and D from the outside; buffer of 2 d fwht_outer_bytes
    void (*outer)(T* x, int64_t stride, const T* signs, int64_t d, int64_t from, int64_t to, T scale, T* buffer);
};

template <class T>
FwhtLoops<T> fwht_loops_scalar();
#ifdef DITHER_X86
template <class T>
FwhtLoops<T> fwht_loops_avx2();
template <class T>
FwhtLoops<T> fwht_loops_avx512();
#endif

template <class T>
void fwht(const FwhtProblem<T>& problem, Isa isa, int threads);

}  // namespace dither
