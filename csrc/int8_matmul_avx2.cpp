// Bytes of even and of odd place as 16-bit numbers, whose products vpmaddwd adds in pairs, exactly (vpmaddubsw would saturate). Codes come there by a
// shuffle that gives each lane the two bytes its code spans, a product with a power of two that brings it to bit 8, and a shift.
#include "int8_lanes_avx2.hpp"

#include "int8_kernel.hpp"

namespace {

inline __m256i aligned(const void* p) { return _mm256_load_si256(static_cast<const __m256i*>(p)); }

struct Words {
    using Int = ::Int;
    using Float = F32;
    struct Code {
        __m256i even, odd;
    };
    using Input = Code;
    static constexpr int tokens = 3, vectors = 2;

    struct Decoder {
        static constexpr int reach = 32;
        struct Aim {
            __m256i even, odd, even_up, odd_up;
        };
        int bits;
        __m256i mask;
        Aim aims[8];

        explicit Decoder(int b, bool anywhere) : bits(b), mask(_mm256_set1_epi16(static_cast<short>((1 << b) - 1))) {
            alignas(32) uint8_t index[2][32];
            alignas(32) uint16_t up[2][16];
            for (int bit = 0; bit < (anywhere ? 8 : 1); ++bit) {
                for (int l = 0; l < 32; ++l) {
                    const int at = bit + l % 16 * b;
                    uint8_t* const two = index[l % 2] + l / 2 * 2;
                    two[0] = static_cast<uint8_t>(at / 8);
                    two[1] = static_cast<uint8_t>(at / 8 + 1);
                    up[l % 2][l / 2] = static_cast<uint16_t>(256 >> at % 8);
                }
                aims[bit] = {aligned(index[0]), aligned(index[1]), aligned(up[0]), aligned(up[1])};
            }
        }
        const Aim& aim(int bit) const { return aims[bit]; }
        Code codes(const uint8_t* from, const Aim& aim) const {
            if (bits == 8) return code(Int::load(from));
            const auto block = [&](int b) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + 2 * bits * b)); };
            const __m256i stream = _mm256_inserti128_si256(_mm256_castsi128_si256(block(0)), block(1), 1);
            return {word(stream, aim.even, aim.even_up), word(stream, aim.odd, aim.odd_up)};
        }
        __m256i word(__m256i stream, __m256i bytes, __m256i up) const {
            return _mm256_and_si256(_mm256_srli_epi16(_mm256_mullo_epi16(_mm256_shuffle_epi8(stream, bytes), up), 8), mask);
        }
    };

    static Code code(Int bytes) { return {_mm256_and_si256(bytes.v, _mm256_set1_epi16(255)), _mm256_srli_epi16(bytes.v, 8)}; }
    static Int bytes(Code code) { return {_mm256_or_si256(code.even, _mm256_slli_epi16(code.odd, 8))}; }
    static Input input(Int bytes) { return {_mm256_srai_epi16(_mm256_slli_epi16(bytes.v, 8), 8), _mm256_srai_epi16(bytes.v, 8)}; }
    static Int dot(Int sum, Code code, Input input) {
        return {_mm256_add_epi32(_mm256_add_epi32(sum.v, _mm256_madd_epi16(code.even, input.even)), _mm256_madd_epi16(code.odd, input.odd))};
    }
};

}  // namespace

namespace dither {

Int8Kernel int8_kernel_avx2() { return int8_kernel<Words>(); }

}  // namespace dither
