// Panels of bfloat16 pairs, 32 codes at a time: permutexvar_epi8 gives each 16-bit lane the two bytes that its code spans, and a shift brings the code to
// the bottom. Up to 5 bits its lowest five index a table of the group's 32 numbers (repeating), made once a group, of whatever codes mean; wider codes are
// computed with, where they are their own values.
// Weights below 2^-126 become zero, as which vdpbf16ps would take them.
#include "transpose_avx512.hpp"

#include "packed_gemm_panel.hpp"

namespace {

template <int bits>
struct Windows {
    static constexpr int lanes = 32, reach = 32;
    __m512i window, shift, table;
    __m512 low, high;          // what the table's codes mean
    __m512 scale[2], zero[2];  // of lanes 0 .. 15 and 16 .. 31

    Windows(int, const float* values) : table(_mm512_setzero_si512()) {
        scale[0] = scale[1] = zero[0] = zero[1] = _mm512_setzero_ps();
        alignas(64) uint8_t index[64];
        alignas(64) uint16_t shifts[32];
        alignas(64) float codes[32];
        for (int l = 0; l < 32; ++l) {
            const int byte = l * bits / 8;
            index[2 * l] = static_cast<uint8_t>(byte);
            index[2 * l + 1] = static_cast<uint8_t>(byte + 1);
            shifts[l] = static_cast<uint16_t>(l * bits % 8);
            const int code = l & ((1 << bits) - 1);
            codes[l] = bits <= 5 && values ? values[code] : static_cast<float>(code);
        }
        window = _mm512_load_si512(index);
        shift = _mm512_load_si512(shifts);
        low = _mm512_load_ps(codes);
        high = _mm512_load_ps(codes + 16);
    }
    // 32 codes, as floats, to weights in bfloat16
    __m512i weights(__m512 first, __m512 second) const {
        const __m512 a = _mm512_mul_ps(scale[0], _mm512_sub_ps(first, zero[0])), b = _mm512_mul_ps(scale[1], _mm512_sub_ps(second, zero[1]));
        return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(b, a));
    }
    void group(float s, float z) {
        scale[0] = scale[1] = _mm512_set1_ps(s);
        zero[0] = zero[1] = _mm512_set1_ps(z);
        if constexpr (bits <= 5) table = weights(low, high);
    }
    void from(int lane, float s, float z) {
        for (int half = 0; half < 2; ++half) {
            const __mmask16 there = static_cast<__mmask16>(0xffffffffu << lane >> 16 * half);
            scale[half] = _mm512_mask_mov_ps(scale[half], there, _mm512_set1_ps(s));
            zero[half] = _mm512_mask_mov_ps(zero[half], there, _mm512_set1_ps(z));
        }
    }
    __m512i code(const uint8_t* source) const {  // with bits of the next above it
        const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(source));
        return _mm512_srlv_epi16(_mm512_permutexvar_epi8(window, _mm512_castsi256_si512(bytes)), shift);
    }
    void store(const uint8_t* source, uint16_t* to) const {
        if constexpr (bits <= 5)
            _mm512_storeu_si512(to, _mm512_permutexvar_epi16(code(source), table));
        else
            store_mixed(source, to);
    }
    void store_mixed(const uint8_t* source, uint16_t* to) const {
        __m512i first, second;
        if constexpr (bits == 8) {
            first = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(source)));
            second = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(source + 16)));
        } else {
            const __m512i alone = _mm512_and_si512(code(source), _mm512_set1_epi16((1 << bits) - 1));
            first = _mm512_cvtepu16_epi32(_mm512_castsi512_si256(alone));
            second = _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(alone, 1));
        }
        if constexpr (bits <= 5)
            _mm512_storeu_si512(to, weights(_mm512_permutex2var_ps(low, first, high), _mm512_permutex2var_ps(low, second, high)));
        else
            _mm512_storeu_si512(to, weights(_mm512_cvtepi32_ps(first), _mm512_cvtepi32_ps(second)));
    }
};

template <int bits>
constexpr dither::GemmDecode decode = decode_panel<Windows<bits>, uint16_t, transpose_panel>;

}  // namespace

namespace dither {

GemmDecode gemm_decode_avx512vbmi(const PackedWeights& w) {
    constexpr GemmDecode of[] = {decode<1>, decode<2>, decode<3>, decode<4>, decode<5>, decode<6>, decode<7>, decode<8>};
    return w.values && w.bits > 5 ? nullptr : of[w.bits - 1];
}

}  // namespace dither
