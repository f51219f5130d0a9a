#include "codes_avx512.hpp"
#include "dequantize_row.hpp"

namespace {

template <class Meaning>
struct Unpack : Meaning {
    using Meaning::Meaning;

    __m512 values(const uint8_t* source, float scale, float zero) const {
        return _mm512_mul_ps(_mm512_set1_ps(scale), _mm512_sub_ps(Meaning::values(source), _mm512_set1_ps(zero)));
    }
    void store_float32(const uint8_t* source, float scale, float zero, float* to) const {
        _mm512_storeu_ps(to, values(source, scale, zero));
    }
    void store_bfloat16(const uint8_t* source, float scale, float zero, uint16_t* to) const {
        const __m512i x = _mm512_castps_si512(values(source, scale, zero));
        const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(x, 16), _mm512_set1_epi32(1));
        const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(x, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16(rounded));
    }
};

}  // namespace

namespace dither {

DequantizeRow dequantize_row_avx512(const DequantizeProblem& p) {
    return !p.table ? dequantize_row<Unpack<Whole>> : p.bits <= 5 ? dequantize_row<Unpack<Near>> : dequantize_row<Unpack<Far>>;
}

}  // namespace dither
