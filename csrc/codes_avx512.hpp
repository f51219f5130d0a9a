// Sixteen codes, which lie in at most sixteen bytes, to 32-bit lanes: a byte shuffle gives each lane the two bytes (or one) that its code spans, a
// shift by its bit within the first byte and a mask leave the code. Include only in files compiled for AVX-512.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace {

struct Codes {
    static constexpr int lanes = 16, reach = 16;
    __m512i bytes, shifts, mask;

    explicit Codes(int bits) {
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

    __m512i indices(const uint8_t* source) const {
        const __m512i stream = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(source)));
        return _mm512_and_si512(_mm512_srlv_epi32(_mm512_shuffle_epi8(stream, bytes), shifts), mask);
    }

    __m512 floats(const uint8_t* source) const { return _mm512_cvtepi32_ps(indices(source)); }
};

// What a code means: itself, or an entry of a table of 2^bits.
struct Whole : Codes {
    Whole(int bits, const float*) : Codes(bits) {}
    __m512 values(const uint8_t* source) const { return floats(source); }
};

struct Near : Codes {  // up to 5 bits: the table lies in two vectors
    __m512 low, high;
    Near(int bits, const float* values) : Codes(bits) {
        float table[32];
        for (int c = 0; c < 32; ++c) table[c] = values[c & ((1 << bits) - 1)];
        low = _mm512_loadu_ps(table);
        high = _mm512_loadu_ps(table + 16);
    }
    __m512 values(const uint8_t* source) const { return _mm512_permutex2var_ps(low, indices(source), high); }
};

struct Far : Codes {
    const float* table;
    Far(int bits, const float* values) : Codes(bits), table(values) {}
    __m512 values(const uint8_t* source) const { return _mm512_i32gather_ps(indices(source), table, 4); }
};

}  // namespace
