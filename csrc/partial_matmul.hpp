// y[t, o] = sum_i w[o, i] x[t, i] for a few tokens, with w of two levels at most places and a few wider codes at the others, from its stored form
// (partial.hpp). w is never written to memory: a row at a time is decoded into the caches (any instruction set), or into registers (VBMI2), to the
// float32 values of the torch reference.
#pragma once

#include "partial.hpp"

namespace dither {

struct PartialMatmul {
    PartialProblem weights;  // without `values`
    int64_t tokens;
    const float* x;  // [T, I]
    float* y;        // [T, O]
};

using PartialRows = void (*)(const PartialMatmul&, int64_t first, int64_t last, float* scratch);  // scratch: [I]

PartialRows partial_rows_scalar();
#ifdef DITHER_X86
PartialRows partial_rows_avx2();
PartialRows partial_rows_avx512();
PartialRows partial_rows_avx512vbmi2(const PartialProblem&);  // nullptr where groups are no multiples of 16 columns
#endif

void partial_matmul(const PartialMatmul&, Isa isa, int threads);

}  // namespace dither
