#include "simd_avx2.hpp"

#include "hadamard_row.hpp"

namespace dither {

HadamardRow hadamard_row_avx2() { return hadamard_row<F32>; }

}  // namespace dither
