// Eight codes lie in at most eight bytes. A byte shuffle gives each 32-bit lane the two bytes (or one) that its code spans, a shift by
// its bit within the first byte and a mask leave the code.
#include <immintrin.h>

#include "dequantize_row.hpp"

namespace {

struct Unpack {
    static constexpr int lanes = 8, reach = 16;
    __m256i bytes, shifts, mask;

    explicit Unpack(int bits) {
        alignas(32) uint8_t index[32];
        alignas(32) int shift[8];
        for (int l = 0; l < 8; ++l) {
            const int byte = l * bits / 8;
            shift[l] = l * bits % 8;
            index[4 * l] = static_cast<uint8_t>(byte);
            index[4 * l + 1] = static_cast<uint8_t>(byte + 1);
            index[4 * l + 2] = index[4 * l + 3] = 0x80;  // zero
        }
        bytes = _mm256_load_si256(reinterpret_cast<const __m256i*>(index));
        shifts = _mm256_load_si256(reinterpret_cast<const __m256i*>(shift));
        mask = _mm256_set1_epi32((1 << bits) - 1);
    }

    __m256 values(const uint8_t* source, float scale, float zero) const {
        const __m256i stream = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(source)));
        const __m256i codes = _mm256_and_si256(_mm256_srlv_epi32(_mm256_shuffle_epi8(stream, bytes), shifts), mask);
        return _mm256_mul_ps(_mm256_set1_ps(scale), _mm256_sub_ps(_mm256_cvtepi32_ps(codes), _mm256_set1_ps(zero)));
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

DequantizeRow dequantize_row_avx2() { return dequantize_row<Unpack>; }

}  // namespace dither
