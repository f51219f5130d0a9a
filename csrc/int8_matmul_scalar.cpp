#include "int8_lanes_scalar.hpp"

#include "int8_kernel.hpp"

namespace {

struct Plain {
    using Int = ::Int;
    using Float = F32;
    struct Code {
        uint8_t v[16];
    };
    struct Input {
        int8_t v[16];
    };
    static constexpr int tokens = 4, vectors = 2;

    struct Decoder {
        static constexpr int reach = 17;
        int bits, mask;

        explicit Decoder(int b, bool) : bits(b), mask((1 << b) - 1) {}
        int aim(int bit) const { return bit; }
        Code codes(const uint8_t* from, int bit) const {
            Code found;
            for (int l = 0; l < 16; ++l, bit += bits) {
                const int two = from[bit / 8] | from[bit / 8 + 1] << 8;
                found.v[l] = static_cast<uint8_t>(two >> bit % 8 & mask);
            }
            return found;
        }
    };

    template <class Bytes>
    static Bytes as(Int x) {
        Bytes found;
        x.store(found.v);
        return found;
    }
    static Code code(Int bytes) { return as<Code>(bytes); }
    static Int bytes(Code code) { return Int::load(code.v); }
    static Input input(Int bytes) { return as<Input>(bytes); }
    static Int dot(Int sum, const Code& code, const Input& input) {
        for (int l = 0; l < 4; ++l)
            for (int k = 4 * l; k < 4 * l + 4; ++k) sum.v[l] += code.v[k] * input.v[k];
        return sum;
    }
};

}  // namespace

namespace dither {

Int8Kernel int8_kernel_scalar() { return int8_kernel<Plain>(); }

}  // namespace dither
