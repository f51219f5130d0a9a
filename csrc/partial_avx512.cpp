// Sixteen bits of the plane are a mask register as they are.
#include <immintrin.h>

#include "partial_matmul_row.hpp"
#include "simd_avx512.hpp"

namespace {

struct Levels {
    static constexpr int lanes = 16;
    __m512 low, high;
    __m256i low16, high16;
    Levels(float l, float h)
        : low(_mm512_set1_ps(l)), high(_mm512_set1_ps(h)), low16(_mm256_set1_epi16(static_cast<int16_t>(to_bfloat16(l)))),
          high16(_mm256_set1_epi16(static_cast<int16_t>(to_bfloat16(h)))) {}
    static __mmask16 mask(const uint8_t* bits) {
        uint16_t two;
        std::memcpy(&two, bits, 2);
        return two;
    }
    void store_float32(const uint8_t* bits, float* to) const { _mm512_storeu_ps(to, _mm512_mask_blend_ps(mask(bits), low, high)); }
    void store_bfloat16(const uint8_t* bits, uint16_t* to) const {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_mask_blend_epi16(mask(bits), low16, high16));
    }
};

}  // namespace

namespace dither {

PartialRow partial_row_avx512() { return partial_row<Levels>; }
PartialRows partial_rows_avx512() { return partial_rows<Levels, F32>; }

}  // namespace dither
