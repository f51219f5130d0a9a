#include "storage_avx512.hpp"
#include "transpose_avx512.hpp"
#include "unpack_avx512.hpp"

#include "packed_gemm_panel.hpp"
#include "packed_gemm_tile.hpp"

namespace dither {

GemmKernel gemm_kernel_avx512(const PackedWeights& w) {
    const GemmDecode named = w.bits <= 5 ? decode_panel<Unpack<Near>, float, transpose_panel> : decode_panel<Unpack<Far>, float, transpose_panel>;
    return {1, 4, w.values ? named : decode_panel<Unpack<Whole>, float, transpose_panel>, tile<F32, 6, 4>, finish};  // 24 sums of 32 registers
}

}  // namespace dither
