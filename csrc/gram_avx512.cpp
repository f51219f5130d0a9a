#include "simd_avx512.hpp"

#include "gram_tile.hpp"

namespace dither {

GramKernel gram_kernel_avx512(RowType type) { return gram_kernel<F32, 8, 3>(type); }  // 24 sums of 32 registers

}  // namespace dither
