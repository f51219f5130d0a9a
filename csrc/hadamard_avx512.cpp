#include "simd_avx512.hpp"

#include "hadamard_row.hpp"

namespace dither {

HadamardRow hadamard_row_avx512() { return hadamard_row<F32>; }

}  // namespace dither
