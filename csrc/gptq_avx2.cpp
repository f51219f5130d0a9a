#include "simd_avx2.hpp"

#include "gptq_tile.hpp"

namespace dither {

template <>
GptqKernel<float> gptq_kernel_avx2() { return kernel<F32>(); }
template <>
GptqKernel<double> gptq_kernel_avx2() { return kernel<F64>(); }

}  // namespace dither
