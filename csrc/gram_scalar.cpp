#include "simd_scalar.hpp"

#include "gram_tile.hpp"

namespace dither {

GramKernel gram_kernel_scalar(RowType type) { return gram_kernel<F32, 2, 1>(type); }  // 8 sums of 16 registers

}  // namespace dither
