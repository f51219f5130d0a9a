#include "simd_avx512.hpp"

#include "fwht_pass.hpp"

namespace dither {

template <>
FwhtLoops<float> fwht_loops_avx512() { return fwht_loops<F32>(); }
template <>
FwhtLoops<double> fwht_loops_avx512() { return fwht_loops<F64>(); }

}  // namespace dither
