// A byte of the plane against the eight bits that lanes stand for.
#include <immintrin.h>

#include "partial_matmul_row.hpp"
#include "simd_avx2.hpp"

namespace {

struct Levels {
    static constexpr int lanes = 8;
    __m256 low, high;
    __m128i low16, high16;
    Levels(float l, float h)
        : low(_mm256_set1_ps(l)), high(_mm256_set1_ps(h)), low16(_mm_set1_epi16(static_cast<int16_t>(to_bfloat16(l)))),
          high16(_mm_set1_epi16(static_cast<int16_t>(to_bfloat16(h)))) {}
    void store_float32(const uint8_t* bits, float* to) const {
        const __m256i own = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
        const __m256i set = _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(*bits), own), own);
        _mm256_storeu_ps(to, _mm256_blendv_ps(low, high, _mm256_castsi256_ps(set)));
    }
    void store_bfloat16(const uint8_t* bits, uint16_t* to) const {
        const __m128i own = _mm_setr_epi16(1, 2, 4, 8, 16, 32, 64, 128);
        const __m128i set = _mm_cmpeq_epi16(_mm_and_si128(_mm_set1_epi16(*bits), own), own);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm_blendv_epi8(low16, high16, set));
    }
};

}  // namespace

namespace dither {

PartialRow partial_row_avx2() { return partial_row<Levels>; }
PartialRows partial_rows_avx2() { return partial_rows<Levels, F32>; }

}  // namespace dither
