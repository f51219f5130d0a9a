// y[t, o] = sum_i scale[o, g] (value(code[o, i]) - zero[o, g]) x[t, i],  g = i / group: products with packed rows (packing.hpp) for a few tokens, as
// when a model reads one token at a time. A code is its own value, or names one of a table: a small float, say. The weights are read once, bits / 8
// bytes each, and never written anywhere:
//     y[t, o] = sum_g scale[o, g] (sum_{i in g} value(code[o, i]) x[t, i]  -  zero[o, g] sum_{i in g} x[t, i])
#pragma once

#include <cstdint>

#include "cpu.hpp"

namespace dither {

enum class ScaleStorage { float32, float16, bfloat16, e8m0, e4m3 };  // the last two: a byte, 2^(b - 127); a small float without infinities

struct PackedMatmul {
    int64_t rows, columns, group, groups, tokens;  // O, I, g, G = ceil(I / g), T
    int bits;
    const uint8_t* packed;  // [O, packed_stride(I, bits)]
    const void* scale;      // [O, G]
    ScaleStorage scale_type;
    float tensor_scale;   // of all weights, beside those of the groups
    const float* values;  // [2^bits], or nullptr: codes are their own values
    const uint8_t* zero;  // [O, G], or nullptr: `middle` for all
    float middle;
    const float* x;     // [T, I]
    const float* sums;  // [T, G], of x over each group; made by `packed_matmul`
    const void* ready;  // x as the kernel wants it (`PackedKernel::prepare`)
    bool exact;         // whether x holds more than bfloat16 does
    float* y;           // [T, O]
};

struct PackedKernel {
    int64_t (*ready_bytes)(const PackedMatmul&);              // nullptr: x is taken as it is
    void (*prepare)(const PackedMatmul&, void* ready);
    void (*rows)(const PackedMatmul&, int64_t first, int64_t last, float* scales);  // scales: [2, G + 32], to be filled
};

PackedKernel packed_kernel_scalar(const PackedMatmul&);
#ifdef DITHER_X86
PackedKernel packed_kernel_avx2(const PackedMatmul&);
PackedKernel packed_kernel_avx512(const PackedMatmul&);
// For values that bfloat16 holds. `rows` is nullptr where there is none for these groups, widths and values.
PackedKernel packed_kernel_avx512bf16(const PackedMatmul&);  // 2 and 4 bits, and whole numbers of 8
PackedKernel packed_kernel_avx512vbmi(const PackedMatmul&);  // the other widths, and 8 bits whose top one is the sign
#endif

void packed_matmul(PackedMatmul, Isa isa, int threads);

}  // namespace dither

// What files of several instruction sets include must not be shared between them by the linker: hence no external linkage.
namespace {

inline float value_of(const dither::PackedMatmul& p, int code) { return p.values ? p.values[code] : static_cast<float>(code); }

inline bool has_zeros(const dither::PackedMatmul& p) { return p.zero || p.middle != 0; }

}  // namespace
