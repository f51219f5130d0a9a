#include "bits_f64_avx512.hpp"

#include "bessel_lanes.hpp"

namespace dither {

BesselKernel bessel_kernel_avx512() { return {classify, elementary, run}; }

}  // namespace dither
