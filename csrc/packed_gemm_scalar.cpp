#include "storage_scalar.hpp"
#include "unpack_scalar.hpp"

#include "packed_gemm_panel.hpp"
#include "packed_gemm_tile.hpp"

namespace {

void transpose_panel(const float* rows, int64_t depth, float* panel) {
    for (int64_t k = 0; k < depth; ++k)
        for (int64_t r = 0; r < P; ++r) panel[k * P + r] = rows[r * depth + k];
}

}  // namespace

namespace dither {

GemmKernel gemm_kernel_scalar() { return {1, 1, decode_panel<Unpack, float, transpose_panel>, tile<F32, 2, 1>, finish}; }

}  // namespace dither
