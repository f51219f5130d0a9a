#include "partial.hpp"

#include <cstring>

#include "packing.hpp"

namespace dither {

namespace {

PartialRow choose(Isa isa) {
    switch (isa) {
#ifdef DITHER_X86
        case Isa::avx512: return partial_row_avx512();
        case Isa::avx2: return partial_row_avx2();
#endif
        default: return partial_row_scalar();
    }
}

}  // namespace

void partial(const PartialProblem& problem, Isa isa, [[maybe_unused]] int threads) {
    const PartialRow row = choose(isa);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t r = 0; r < problem.rows; ++r) row(problem, r);
}

void places(const PlacesProblem& p) {
    const int64_t stride = packed_stride(p.columns, 1), total = p.rows * p.columns;
    for (int64_t r = 0; r < p.rows; ++r) {
        uint8_t* const row = p.bitmap + r * stride;
        std::memset(row, 0, stride);
        if (!p.listed) {
            std::memset(row, 0xff, p.columns / 8);
            if (p.columns % 8) row[p.columns / 8] = static_cast<uint8_t>((1u << p.columns % 8) - 1);
        }
    }
    int64_t k = 0, first = 0;  // the row that the last place was in starts at `first`
    uint8_t* row = p.bitmap;
    for (int64_t byte = 0; byte < p.high_bytes && k < p.count; ++byte) {
        for (unsigned left = p.high[byte]; left && k < p.count; left &= left - 1, ++k) {
            int64_t place = 8 * byte + __builtin_ctz(left) - k;
            if (p.low_bits) {
                const int64_t at = k * p.low_bits, from = at / 8;
                const unsigned one = from < p.low_bytes ? p.low[from] : 0, two = from + 1 < p.low_bytes ? p.low[from + 1] << 8 : 0;
                place = place << p.low_bits | (((one | two) >> at % 8) & ((1u << p.low_bits) - 1));
            }
            if (place >= total) continue;
            if (place < first || place >= first + p.columns) {
                const int64_t r = place / p.columns;
                first = r * p.columns;
                row = p.bitmap + r * stride;
            }
            row[(place - first) / 8] ^= static_cast<uint8_t>(1u << (place - first) % 8);
        }
    }
}

}  // namespace dither
