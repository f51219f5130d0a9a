// Rows times a normalised Hadamard matrix given by its Kronecker factors, each of entries +-1:
//     y = x (D_1 x ... x D_r x W) / sqrt(n),    n = d_1 ... d_r power,    W_ij = (-1)^popcount(i & j)
// The row times 1 / sqrt(n) goes through one factor after the other between two buffers that stay in the first cache. A product with +-1
// is exact, and every version adds in the same order, so all instruction sets give the same bits.
#pragma once

#include <cstdint>

#include "cpu.hpp"

namespace dither {

inline constexpr int64_t hadamard_lanes = 16;  // rows of the last matrix are padded to this, and buffers are longer by it

struct HadamardProblem {
    int64_t rows, columns;  // R, n
    int64_t factors;        // r
    const int64_t* sizes;   // [r] d_i; without a power the last is at least 16 or the only one
    const float* signs;     // the matrices [d, d] one after the other, a row for each input; without a power the last has padded rows
    int64_t power;          // 1, or a power of two >= 16
    float scale;            // 1 / sqrt(n)
    bool bfloat16;
    const void* x;  // [R, n]
    void* y;        // [R, n]
};

// `buffers`: 2 (n + 16) floats
using HadamardRow = void (*)(const HadamardProblem&, int64_t row, float* buffers);

HadamardRow hadamard_row_scalar();
#ifdef DITHER_X86
HadamardRow hadamard_row_avx2();
HadamardRow hadamard_row_avx512();
#endif

void hadamard(HadamardProblem, Isa isa, int threads);  // sets the scale

}  // namespace dither
