#include "simd_scalar.hpp"

#include "hadamard_row.hpp"

namespace dither {

HadamardRow hadamard_row_scalar() { return hadamard_row<F32>; }

}  // namespace dither
