#include "packed_matmul_row.hpp"
#include "simd_scalar.hpp"

namespace {

using Eight = Scalar<float, 8>;

struct Codes {
    static constexpr int reach = 8;
    const dither::PackedMatmul& p;
    int bits;
    uint64_t mask;
    explicit Codes(const dither::PackedMatmul& of) : p(of), bits(of.bits), mask((1u << of.bits) - 1) {}

    Eight values(const uint8_t* source) const {
        uint64_t word;
        std::memcpy(&word, source, 8);
        float lanes[Eight::lanes];
        for (int l = 0; l < Eight::lanes; ++l) lanes[l] = value_of(p, static_cast<int>((word >> l * bits) & mask));
        return Eight::load(lanes);
    }
};

}  // namespace

namespace dither {

PackedKernel packed_kernel_scalar(const PackedMatmul&) { return {nullptr, nullptr, packed_rows<Codes, Eight>}; }

}  // namespace dither
