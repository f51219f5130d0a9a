// For processors with AVX512_VNNI and AVX512_VBMI, in files compiled for both: int8_matmul.cpp asks for them. vpdpbusd multiplies unsigned codes by signed
// q and adds four products a lane, without saturation; vpermb and vpmultishiftqb bring codes of any width to bytes: each 64-bit lane gets the bytes that
// its eight codes span, and each byte of it eight bits from where its code begins.
#pragma once

#include "int8_lanes_avx512.hpp"

#include "int8_kernel.hpp"

namespace {

struct Vnni {
    using Int = ::Int;
    using Float = F32;
    using Code = Int;
    using Input = Int;
    static constexpr int tokens = 6, vectors = 2;

    struct Decoder {
        static constexpr int reach = 64;
        int bits;
        __m512i window, begin, mask;

        explicit Decoder(int b, bool) : bits(b), mask(_mm512_set1_epi8(static_cast<char>((1 << b) - 1))) {
            alignas(64) uint8_t index[64], first[64];
            for (int l = 0; l < 64; ++l) {
                index[l] = static_cast<uint8_t>((l / 8 * b + l % 8) % 64);
                first[l] = static_cast<uint8_t>(l % 8 * b);
            }
            window = _mm512_load_si512(index);
            begin = _mm512_load_si512(first);
        }
        __m512i aim(int bit) const { return _mm512_add_epi8(begin, _mm512_set1_epi8(static_cast<char>(bit))); }
        Int codes(const uint8_t* from, __m512i aim) const {
            const __m512i stream = _mm512_loadu_si512(from);
            if (bits == 8) return {stream};
            return {_mm512_and_si512(_mm512_multishift_epi64_epi8(aim, _mm512_permutexvar_epi8(window, stream)), mask)};
        }
    };

    static Int code(Int bytes) { return bytes; }
    static Int bytes(Int code) { return code; }
    static Int input(Int bytes) { return bytes; }
    // In assembly: GCC 12 gives the intrinsic a copy of its sum, and then the loop of `many` runs out of registers.
    static Int dot(Int sum, Int code, Int input) {
        asm("vpdpbusd %2, %1, %0" : "+v"(sum.v) : "v"(code.v), "v"(input.v));
        return sum;
    }
};

}  // namespace
