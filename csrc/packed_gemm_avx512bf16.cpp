#include "pairs_avx512bf16.hpp"
#include "storage_avx512.hpp"
#include "transpose_avx512.hpp"
#include "unpack_avx512.hpp"

#include "packed_gemm_panel.hpp"
#include "packed_gemm_tile.hpp"

namespace dither {

GemmKernel gemm_kernel_avx512bf16(const PackedWeights& w) {
    const GemmDecode named = w.bits <= 5 ? decode_panel<Unpack<Near>, uint16_t, transpose_panel> : decode_panel<Unpack<Far>, uint16_t, transpose_panel>;
    return {2, 4, w.values ? named : decode_panel<Unpack<Whole>, uint16_t, transpose_panel>, tile<Bf16Pairs, 6, 4>, finish};
}

}  // namespace dither
