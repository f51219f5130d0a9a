// By vdpbf16ps: a lane holds two bfloat16, of rows 2k and 2k + 1.
#include "pairs_avx512bf16.hpp"

#include "gram_tile.hpp"

namespace {

void pack_pairs(const void* x, int64_t depth, int64_t columns, int64_t c, float* to) {
    const uint16_t* from = static_cast<const uint16_t*>(x) + c;
    const int64_t width = columns - c < P ? columns - c : P;
    const __mmask16 mask = static_cast<__mmask16>((1u << width) - 1);
    for (int64_t k = 0; k < depth; k += 2, from += 2 * columns, to += P) {
        const __m512i even = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, from));
        const __mmask16 mask_odd = k + 1 < depth ? mask : 0;  // a masked load touches no memory where the mask is 0
        const __m512i odd = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask_odd, from + (mask_odd ? columns : 0)));
        _mm512_storeu_si512(to, _mm512_or_si512(even, _mm512_slli_epi32(odd, 16)));
    }
}

}  // namespace

namespace dither {

GramKernel gram_kernel_avx512bf16() { return {8, 3, 2, pack_pairs, tile<Bf16Pairs, 8, 3>}; }

}  // namespace dither
