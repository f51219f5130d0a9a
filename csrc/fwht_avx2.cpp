#include "simd_avx2.hpp"

#include "fwht_pass.hpp"

namespace dither {

template <>
FwhtLoops<float> fwht_loops_avx2() { return fwht_loops<F32>(); }
template <>
FwhtLoops<double> fwht_loops_avx2() { return fwht_loops<F64>(); }

}  // namespace dither
