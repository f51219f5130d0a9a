#include "packed_matmul_row.hpp"
#include "simd_scalar.hpp"

namespace {

using Eight = Scalar<float, 8>;

struct Codes {
    static constexpr int reach = 8;
    int bits;
    uint64_t mask;
    explicit Codes(int b) : bits(b), mask((1u << b) - 1) {}

    Eight values(const uint8_t* source) const {
        uint64_t word;
        std::memcpy(&word, source, 8);
        float lanes[Eight::lanes];
        for (int l = 0; l < Eight::lanes; ++l) lanes[l] = static_cast<float>((word >> l * bits) & mask);
        return Eight::load(lanes);
    }
};

}  // namespace

namespace dither {

PackedKernel packed_kernel_scalar() { return {nullptr, nullptr, packed_rows<Codes, Eight>}; }

}  // namespace dither
