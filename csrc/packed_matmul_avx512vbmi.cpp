// Codes of 1, 3, 5, 6 and 7 bits, 32 at a time: permutexvar_epi8 gives each 16-bit lane the two bytes that its code spans, a shift brings the code to
// the bottom, and its lowest bits index tables of bfloat16: one of 32 numbers (repeating) up to 5 bits, two for 6 bits, four for 7.
#include "packed_matmul_bf16.hpp"

namespace {

template <int width>
struct Windows {
    static constexpr int bits = width, block = 32, bytes = 4 * bits, codes = 1, digits = 1;
    __m512i window, shift, table[4];

    Windows() {
        alignas(64) uint8_t index[64];
        alignas(64) uint16_t shifts[32], values[4][32];
        for (int l = 0; l < 32; ++l) {
            const int byte = l * bits / 8;
            index[2 * l] = static_cast<uint8_t>(byte);
            index[2 * l + 1] = static_cast<uint8_t>(byte + 1);
            shifts[l] = static_cast<uint16_t>(l * bits % 8);
            for (int t = 0; t < 4; ++t) values[t][l] = to_bfloat16(static_cast<float>((32 * t + l) & ((1 << bits) - 1)));
        }
        window = _mm512_load_si512(index);
        shift = _mm512_load_si512(shifts);
        for (int t = 0; t < 4; ++t) table[t] = _mm512_load_si512(values[t]);
    }
    __m512i load(const uint8_t* from, __mmask64 there) const {
        return _mm512_srlv_epi16(_mm512_permutexvar_epi8(window, _mm512_maskz_loadu_epi8(there, from)), shift);
    }
    __m512i values(__m512i code, int) const {
        if constexpr (bits <= 5) return _mm512_permutexvar_epi16(code, table[0]);
        const __m512i lower = _mm512_permutex2var_epi16(table[0], code, table[1]);
        if constexpr (bits == 6) return lower;
        const __m512i upper = _mm512_permutex2var_epi16(table[2], code, table[3]);
        return _mm512_mask_blend_epi16(_mm512_test_epi16_mask(code, _mm512_set1_epi16(64)), lower, upper);
    }
};

}  // namespace

namespace dither {

PackedKernel packed_kernel_avx512vbmi(const PackedMatmul& p) {
    switch (p.bits) {
        case 1: return kernel_if_it_fits<Windows<1>>(p);
        case 3: return kernel_if_it_fits<Windows<3>>(p);
        case 5: return kernel_if_it_fits<Windows<5>>(p);
        case 6: return kernel_if_it_fits<Windows<6>>(p);
        case 7: return kernel_if_it_fits<Windows<7>>(p);
        default: return {nullptr, nullptr, nullptr};
    }
}

}  // namespace dither
