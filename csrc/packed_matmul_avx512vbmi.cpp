// Codes of 1, 3, 5, 6 and 7 bits, a few in each of 32 lanes of 16 bits: permutexvar_epi8 gives a lane the two bytes that its codes span, a shift brings
// the first to the bottom, further ones the others, and their lowest bits index tables of bfloat16: one of 32 numbers (repeating) up to 5 bits, two for
// 6 bits, four for 7.
//
// Codes of 8 bits whose top bit is the sign of their value, 64 at a time: permutex2var_epi8 finds the lower and the upper byte of 128 bfloat16.
#include "packed_matmul_bf16.hpp"
#include "tables_avx512.hpp"

namespace {

template <int width, int many>
struct Windows {
    static constexpr int bits = width, codes = many, digits = codes, block = 32 * codes, bytes = 4 * bits * codes;
    __m512i window, shift, table[4];

    explicit Windows(const dither::PackedMatmul& p) {
        alignas(64) uint8_t index[64];
        alignas(64) uint16_t shifts[32];
        for (int l = 0; l < 32; ++l) {
            const int byte = l * codes * bits / 8;
            index[2 * l] = static_cast<uint8_t>(byte);
            index[2 * l + 1] = static_cast<uint8_t>(byte + 1);
            shifts[l] = static_cast<uint16_t>(l * codes * bits % 8);
        }
        window = _mm512_load_si512(index);
        shift = _mm512_load_si512(shifts);
        for (int t = 0; t < 4; ++t) table[t] = meanings(p, 32 * t, (1 << bits) - 1);
    }
    __m512i load(__m512i bytes) const { return _mm512_srlv_epi16(_mm512_permutexvar_epi8(window, bytes), shift); }
    __m512i values(__m512i loaded, int k) const {
        const __m512i code = _mm512_srli_epi16(loaded, k * bits);
        if constexpr (bits <= 5) return _mm512_permutexvar_epi16(code, table[0]);
        const __m512i lower = _mm512_permutex2var_epi16(table[0], code, table[1]);
        if constexpr (bits == 6) return lower;
        const __m512i upper = _mm512_permutex2var_epi16(table[2], code, table[3]);
        return _mm512_mask_blend_epi16(_mm512_test_epi16_mask(code, _mm512_set1_epi16(64)), lower, upper);
    }
};

struct Signed {
    static constexpr int bits = 8, block = 64, bytes = 64, codes = 2, digits = 2;
    struct Halves {
        __m512i low, high;  // bytes of 64 numbers
    };
    Halves table[2];

    explicit Signed(const dither::PackedMatmul& p) {
        alignas(64) uint8_t low[128], high[128];
        for (int c = 0; c < 128; ++c) {
            const uint16_t value = to_bfloat16(p.values[c]);
            low[c] = static_cast<uint8_t>(value);
            high[c] = static_cast<uint8_t>(value >> 8);
        }
        for (int h = 0; h < 2; ++h) table[h] = {_mm512_load_si512(low + 64 * h), _mm512_load_si512(high + 64 * h)};
    }
    static __m512i with_bits(__m512i a, __m512i b, __m512i of) { return _mm512_ternarylogic_epi64(a, b, of, 0xf8); }  // a | (b & of)
    Halves load(__m512i code) const {
        const __m512i high = _mm512_permutex2var_epi8(table[0].high, code, table[1].high);
        return {_mm512_permutex2var_epi8(table[0].low, code, table[1].low), with_bits(high, code, _mm512_set1_epi8(-128))};
    }
    __m512i values(Halves found, int k) const {  // of the even codes, of the odd ones
        return k == 0 ? with_bits(_mm512_slli_epi16(found.high, 8), found.low, _mm512_set1_epi16(0x00ff))
                      : with_bits(_mm512_srli_epi16(found.low, 8), found.high, _mm512_set1_epi16(static_cast<int16_t>(0xff00)));
    }
    static bool suits(const dither::PackedMatmul& p) {
        int wrong = 0;
        for (int c = 0; c < 128; ++c) {
            const int value = to_bfloat16(value_of(p, c));
            wrong |= (value & 0x8000) | (to_bfloat16(value_of(p, c + 128)) ^ (value | 0x8000));
        }
        return !wrong;
    }
};

// The most codes of a lane that two bytes always hold, where groups allow so many, or one.
template <int bits, int many>
dither::PackedKernel windows(const dither::PackedMatmul& p) {
    const dither::PackedKernel found = kernel_if_it_fits<Windows<bits, many>>(p);
    return found.rows ? found : kernel_if_it_fits<Windows<bits, 1>>(p);
}

}  // namespace

namespace dither {

PackedKernel packed_kernel_avx512vbmi(const PackedMatmul& p) {
    switch (p.bits) {
        case 1: return windows<1, 4>(p);
        case 3: return windows<3, 4>(p);
        case 5: return windows<5, 2>(p);
        case 6: return windows<6, 2>(p);
        case 7: return kernel_if_it_fits<Windows<7, 1>>(p);
        case 8:
            if (Signed::suits(p)) return kernel_if_it_fits<Signed>(p);
            [[fallthrough]];
        default: return {nullptr, nullptr, nullptr};
    }
}

}  // namespace dither
