// Codes of 2, 4 and 8 bits as bfloat16 without unpacking them. A vector of 64 bytes holds 512 / bits codes. Shifted right by k digits (a digit: a code of 2
// or 4 bits, half a whole number of 8), the lowest five bits of each 16-bit lane index a table of bfloat16 whose upper half repeats the lower, so no mask
// is needed: a shift and permutexvar_epi16 give digit k of 32 lanes, exactly. The high half of 8 bits counts sixteenfold.
#include "packed_matmul_bf16.hpp"
#include "tables_avx512.hpp"

namespace {

template <int width>
struct Digits {
    static constexpr int bits = width, block = 512 / bits, bytes = 64, codes = 16 / bits, digits = bits == 8 ? 4 : codes;
    static constexpr int digit = bits == 8 ? 4 : bits;
    __m512i low, high;

    explicit Digits(const dither::PackedMatmul& p) : low(meanings(p, 0, (1 << digit) - 1)), high(upper_halves()) {}
    __m512i load(__m512i bytes) const { return bytes; }
    __m512i values(__m512i loaded, int k) const {
        return _mm512_permutexvar_epi16(_mm512_srli_epi16(loaded, k * digit), bits == 8 && k % 2 ? high : low);
    }
};

}  // namespace

namespace dither {

PackedKernel packed_kernel_avx512bf16(const PackedMatmul& p) {
    switch (p.bits) {
        case 2: return kernel_if_it_fits<Digits<2>>(p);
        case 4: return kernel_if_it_fits<Digits<4>>(p);
        case 8:
            if (!p.values) return kernel_if_it_fits<Digits<8>>(p);
            [[fallthrough]];
        default: return {nullptr, nullptr, nullptr};
    }
}

}  // namespace dither
