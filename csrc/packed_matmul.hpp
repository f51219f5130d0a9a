// y[t, o] = sum_i W[o, i] x[t, i]: products with packed weights (packed_weights.hpp) for a few tokens, as when a model reads one token at a time. The
// weights are read once, bits / 8 bytes each, and never written anywhere:
//     y[t, o] = sum_g scale[o, g] (sum_{i in g} value(code[o, i]) x[t, i]  -  zero[o, g] sum_{i in g} x[t, i])
#pragma once

#include <cstdint>

#include "cpu.hpp"
#include "packed_weights.hpp"

namespace dither {

struct PackedMatmul : PackedWeights {
    int64_t tokens;     // T
    const float* x;     // [T, I]
    const float* sums;  // [T, G], of x over each group; made by `packed_matmul`
    const void* ready;  // x as the kernel wants it (`PackedKernel::prepare`)
    bool exact;         // whether x holds more than bfloat16 does
    float* y;           // [T, O]
};

struct PackedKernel {
    int64_t (*ready_bytes)(const PackedMatmul&);  // nullptr: x is taken as it is
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

PackedKernel packed_kernel(const PackedMatmul&, Isa isa);  // the best of them
void sum_groups(const PackedMatmul&, float* to);           // `PackedMatmul::sums`
void packed_matmul(PackedMatmul, Isa isa, int threads);

}  // namespace dither
