#include "simd_scalar.hpp"

#include "fwht_pass.hpp"

namespace dither {

template <>
FwhtLoops<float> fwht_loops_scalar() { return fwht_loops<F32>(); }
template <>
FwhtLoops<double> fwht_loops_scalar() { return fwht_loops<F64>(); }

}  // namespace dither
