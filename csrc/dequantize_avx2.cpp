#include "codes_avx2.hpp"
#include "dequantize_row.hpp"

namespace {

template <class Meaning>
struct Unpack : Meaning {
    using Meaning::Meaning;

    __m256 values(const uint8_t* source, float scale, float zero) const {
        return _mm256_mul_ps(_mm256_set1_ps(scale), _mm256_sub_ps(Meaning::values(source), _mm256_set1_ps(zero)));
    }
    void store_float32(const uint8_t* source, float scale, float zero, float* to) const {
        _mm256_storeu_ps(to, values(source, scale, zero));
    }
    void store_bfloat16(const uint8_t* source, float scale, float zero, uint16_t* to) const {
        const __m256i x = _mm256_castps_si256(values(source, scale, zero));
        const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(x, 16), _mm256_set1_epi32(1));
        const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(x, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
        const __m128i eight = _mm_packus_epi32(_mm256_castsi256_si128(rounded), _mm256_extracti128_si256(rounded, 1));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to), eight);
    }
};

}  // namespace

namespace dither {

DequantizeRow dequantize_row_avx2(const DequantizeProblem& p) {
    return !p.table ? dequantize_row<Unpack<Whole>> : p.bits <= 4 ? dequantize_row<Unpack<Near>> : dequantize_row<Unpack<Far>>;
}

}  // namespace dither
