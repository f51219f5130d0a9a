#include "codes_avx512.hpp"
#include "packed_matmul_row.hpp"
#include "simd_avx512.hpp"

namespace {

struct Whole : Codes {
    explicit Whole(const dither::PackedMatmul& p) : Codes(p.bits) {}
    F32 values(const uint8_t* source) const { return {floats(source)}; }
};

// Up to 5 bits: the table lies in two vectors.
struct Near : Codes {
    __m512 low, high;
    explicit Near(const dither::PackedMatmul& p) : Codes(p.bits) {
        float table[32];
        for (int c = 0; c < 32; ++c) table[c] = p.values[c & ((1 << p.bits) - 1)];
        low = _mm512_loadu_ps(table);
        high = _mm512_loadu_ps(table + 16);
    }
    F32 values(const uint8_t* source) const { return {_mm512_permutex2var_ps(low, indices(source), high)}; }
};

struct Far : Codes {
    const float* table;
    explicit Far(const dither::PackedMatmul& p) : Codes(p.bits), table(p.values) {}
    F32 values(const uint8_t* source) const { return {_mm512_i32gather_ps(indices(source), table, 4)}; }
};

}  // namespace

namespace dither {

PackedKernel packed_kernel_avx512(const PackedMatmul& p) {
    if (!p.values) return {nullptr, nullptr, packed_rows<Whole, F32>};
    return {nullptr, nullptr, p.bits <= 5 ? packed_rows<Near, F32> : packed_rows<Far, F32>};
}

}  // namespace dither
