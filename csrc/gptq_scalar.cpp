#include "simd_scalar.hpp"

#include "gptq_tile.hpp"

namespace dither {

template <>
GptqKernel<float> gptq_kernel_scalar() { return kernel<F32>(); }
template <>
GptqKernel<double> gptq_kernel_scalar() { return kernel<F64>(); }

}  // namespace dither
