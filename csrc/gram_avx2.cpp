#include "simd_avx2.hpp"

#include "gram_tile.hpp"

namespace dither {

GramKernel gram_kernel_avx2(RowType type) { return gram_kernel<F32, 4, 1>(type); }  // 8 sums of 16 registers: enough to hide the latency of two FMAs a cycle

}  // namespace dither
