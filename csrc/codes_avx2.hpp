// Eight codes, which lie in at most eight bytes, to 32-bit lanes; see codes_avx512.hpp. Include only in files compiled for AVX2.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace {

struct Codes {
    static constexpr int lanes = 8, reach = 16;
    __m256i bytes, shifts, mask;

    explicit Codes(int bits) {
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

    __m256i indices(const uint8_t* source) const {
        const __m256i stream = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(source)));
        return _mm256_and_si256(_mm256_srlv_epi32(_mm256_shuffle_epi8(stream, bytes), shifts), mask);
    }

    __m256 floats(const uint8_t* source) const { return _mm256_cvtepi32_ps(indices(source)); }
};

// What a code means: itself, or an entry of a table of 2^bits.
struct Whole : Codes {
    Whole(int bits, const float*) : Codes(bits) {}
    __m256 values(const uint8_t* source) const { return floats(source); }
};

struct Near : Codes {  // up to 4 bits: the table lies in two vectors, and bit 3 of a code, moved to the sign, chooses between them
    __m256 low, high;
    Near(int bits, const float* values) : Codes(bits) {
        float table[16];
        for (int c = 0; c < 16; ++c) table[c] = values[c & ((1 << bits) - 1)];
        low = _mm256_loadu_ps(table);
        high = _mm256_loadu_ps(table + 8);
    }
    __m256 values(const uint8_t* source) const {
        const __m256i code = indices(source);
        const __m256 upper = _mm256_castsi256_ps(_mm256_slli_epi32(code, 28));
        return _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, code), _mm256_permutevar8x32_ps(high, code), upper);
    }
};

struct Far : Codes {
    const float* table;
    Far(int bits, const float* values) : Codes(bits), table(values) {}
    __m256 values(const uint8_t* source) const { return _mm256_i32gather_ps(table, indices(source), 4); }
};

}  // namespace
