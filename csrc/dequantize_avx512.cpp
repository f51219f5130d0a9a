// Sixteen codes lie in at most sixteen bytes; see dequantize_avx2.cpp.
#include <immintrin.h>

#include "dequantize_row.hpp"

namespace {

struct Unpack {
    static constexpr int lanes = 16, reach = 16;
    __m512i bytes, shifts, mask;

    explicit Unpack(int bits) {
        alignas(64) uint8_t index[64];
        alignas(64) int shift[16];
        for (int l = 0; l < 16; ++l) {
            const int byte = l * bits / 8;
            shift[l] = l * bits % 8;
            index[4 * l] = static_cast<uint8_t>(byte);
            index[4 * l + 1] = static_cast<uint8_t>(byte + 1 < 16 ? byte + 1 : 0x80);
            index[4 * l + 2] = index[4 * l + 3] = 0x80;  // zero
        }
        bytes = _mm512_load_si512(index);
        shifts = _mm512_load_si512(shift);
        mask = _mm512_set1_epi32((1 << bits) - 1);
    }

    __m512 values(const uint8_t* source, float scale, float zero) const {
        const __m512i stream = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(source)));
        const __m512i codes = _mm512_and_si512(_mm512_srlv_epi32(_mm512_shuffle_epi8(stream, bytes), shifts), mask);
        return _mm512_mul_ps(_mm512_set1_ps(scale), _mm512_sub_ps(_mm512_cvtepi32_ps(codes), _mm512_set1_ps(zero)));
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

DequantizeRow dequantize_row_avx512() { return dequantize_row<Unpack>; }

}  // namespace dither
