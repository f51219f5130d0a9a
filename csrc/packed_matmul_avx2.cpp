#include "codes_avx2.hpp"
#include "packed_matmul_row.hpp"
#include "simd_avx2.hpp"

namespace {

struct Vectors : Codes {
    using Codes::Codes;
    F32 values(const uint8_t* source) const { return {floats(source)}; }
};

}  // namespace

namespace dither {

PackedKernel packed_kernel_avx2() { return {nullptr, nullptr, packed_rows<Vectors, F32>}; }

}  // namespace dither
