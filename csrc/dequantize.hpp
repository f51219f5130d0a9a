// values[o, i] = scale[o, g] (code[o, i] - zero[o, g]), g = i / group, from packed rows (packing.hpp) to float32 or bfloat16; a code is its own value, or
// names one of a table. One rounding for the product and, for bfloat16, one more: the arithmetic of the torch reference.
#pragma once

#include <cstdint>

#include "cpu.hpp"

namespace dither {

struct DequantizeProblem {
    int64_t rows, columns, group, groups;  // O, I, g, G = ceil(I / g)
    int bits;
    const uint8_t* packed;  // [O, packed_stride(I, bits)]
    const float* table;     // [2^bits], or nullptr: codes are their own values
    const float* scale;     // [O, G]
    const float* zero;      // [O, G]
    void* values;           // [O, I]
    bool bfloat16;
};

using DequantizeRow = void (*)(const DequantizeProblem&, int64_t row);

DequantizeRow row_dequantizer(const DequantizeProblem&, Isa isa);  // the best of them
DequantizeRow dequantize_row_scalar(const DequantizeProblem&);
#ifdef DITHER_X86
DequantizeRow dequantize_row_avx2(const DequantizeProblem&);
DequantizeRow dequantize_row_avx512(const DequantizeProblem&);
#endif

void dequantize(const DequantizeProblem&, Isa isa, int threads);

}  // namespace dither
