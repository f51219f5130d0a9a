#include "codes_avx2.hpp"
#include "packed_matmul_row.hpp"
#include "simd_avx2.hpp"

namespace {

struct Whole : Codes {
    explicit Whole(const dither::PackedMatmul& p) : Codes(p.bits) {}
    F32 values(const uint8_t* source) const { return {floats(source)}; }
};

// Up to 4 bits: the table lies in two vectors, and bit 3 of a code, moved to the sign, chooses between them.
struct Near : Codes {
    __m256 low, high;
    explicit Near(const dither::PackedMatmul& p) : Codes(p.bits) {
        float table[16];
        for (int c = 0; c < 16; ++c) table[c] = p.values[c & ((1 << p.bits) - 1)];
        low = _mm256_loadu_ps(table);
        high = _mm256_loadu_ps(table + 8);
    }
    F32 values(const uint8_t* source) const {
        const __m256i code = indices(source);
        const __m256 upper = _mm256_castsi256_ps(_mm256_slli_epi32(code, 28));
        return {_mm256_blendv_ps(_mm256_permutevar8x32_ps(low, code), _mm256_permutevar8x32_ps(high, code), upper)};
    }
};

struct Far : Codes {
    const float* table;
    explicit Far(const dither::PackedMatmul& p) : Codes(p.bits), table(p.values) {}
    F32 values(const uint8_t* source) const { return {_mm256_i32gather_ps(table, indices(source), 4)}; }
};

}  // namespace

namespace dither {

PackedKernel packed_kernel_avx2(const PackedMatmul& p) {
    if (!p.values) return {nullptr, nullptr, packed_rows<Whole, F32>};
    return {nullptr, nullptr, p.bits <= 4 ? packed_rows<Near, F32> : packed_rows<Far, F32>};
}

}  // namespace dither
