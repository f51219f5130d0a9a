#include "storage_scalar.hpp"
#include "transpose_scalar.hpp"
#include "unpack_scalar.hpp"

#include "packed_gemm_panel.hpp"
#include "packed_gemm_tile.hpp"

namespace dither {

GemmKernel gemm_kernel_scalar() { return {1, 1, decode_panel<Unpack, float, transpose_panel>, tile<F32, 2, 1>, finish}; }

}  // namespace dither
