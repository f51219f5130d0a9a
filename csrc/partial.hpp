// A matrix that is two levels mu +- alpha at most places and a few 8-bit (or 2 to 7 bit) codes at the others, from its stored form:
//
//     mask    one bit a weight: 1 = two levels, 0 = salient        plane   one bit a weight: the level; at salient places the code's top bit
//     codes   what else a salient code has, `rest` bits each, one LSB-first stream over the matrix, row by row in column order
//     values[o, i] = plane ? high[o, g] : low[o, g]                            where mask, g = i / group
//                    scale[o] (code - zero[o]),  code = rest + 2^rest plane    elsewhere
//
// The arithmetic of the torch reference: one rounding for the product and, for bfloat16, one more. Cost: one write a weight, and a few
// scalar operations a salient one.
#pragma once

#include <cstdint>

#include "cpu.hpp"

namespace dither {

struct PartialProblem {
    int64_t rows, columns, group, groups;  // O, I, g, G = ceil(I / g)
    int rest;                              // bits of a salient code without its top one
    const uint8_t* mask;                   // [O, packed_stride(I, 1)]; null: all salient, or none (no codes)
    const uint8_t* plane;                  // [O, packed_stride(I, 1)]
    const float* low;                      // [O, G]
    const float* high;                     // [O, G]
    const uint8_t* codes;                  // [code_bytes]; null: none is salient
    int64_t code_bytes;
    const uint32_t* offsets;  // [O]: salient weights before the row; null where all are
    const float* scale;       // [O]
    const float* zero;        // [O]
    void* values;             // [O, I]
    bool bfloat16;
};

using PartialRow = void (*)(const PartialProblem&, int64_t row);

PartialRow partial_row_scalar();
#ifdef DITHER_X86
PartialRow partial_row_avx2();
PartialRow partial_row_avx512();
#endif

void partial(const PartialProblem&, Isa isa, int threads);

// An Elias-Fano list of `count` places in a matrix of rows x columns, to a bitmap [rows, packed_stride(columns, 1)]: the listed bits are
// `listed`, the others not, padding zero. Place k is (t - k) 2^low_bits + low_k, with t the position of the k-th set bit of `high`. Places
// beyond the matrix (of a damaged list) are left out.
struct PlacesProblem {
    int64_t rows, columns, count;
    int low_bits;
    const uint8_t* low;  // [low_bytes]
    int64_t low_bytes;
    const uint8_t* high;  // [high_bytes]
    int64_t high_bytes;
    bool listed;
    uint8_t* bitmap;
};

void places(const PlacesProblem&);

}  // namespace dither
