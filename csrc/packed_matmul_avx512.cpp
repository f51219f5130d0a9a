#include "codes_avx512.hpp"
#include "packed_matmul_row.hpp"
#include "simd_avx512.hpp"

namespace {

template <class Meaning>
struct Vectors : Meaning {
    explicit Vectors(const dither::PackedMatmul& p) : Meaning(p.bits, p.values) {}
    F32 values(const uint8_t* source) const { return {Meaning::values(source)}; }
};

}  // namespace

namespace dither {

PackedKernel packed_kernel_avx512(const PackedMatmul& p) {
    if (!p.values) return {nullptr, nullptr, packed_rows<Vectors<Whole>, F32>};
    return {nullptr, nullptr, p.bits <= 5 ? packed_rows<Vectors<Near>, F32> : packed_rows<Vectors<Far>, F32>};
}

}  // namespace dither
