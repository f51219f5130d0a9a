#include "bits_f64_avx2.hpp"

#include "bessel_lanes.hpp"

namespace dither {

BesselKernel bessel_kernel_avx2() { return {classify, elementary, run}; }

}  // namespace dither
