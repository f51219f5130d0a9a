#include "bits_f64_scalar.hpp"

#include "bessel_lanes.hpp"

namespace dither {

BesselKernel bessel_kernel_scalar() { return {classify, elementary, run}; }

}  // namespace dither
