#include "dequantize.hpp"

namespace dither {

namespace {

DequantizeRow choose(Isa isa) {
    switch (isa) {
#ifdef DITHER_X86
        case Isa::avx512: return dequantize_row_avx512();
        case Isa::avx2: return dequantize_row_avx2();
#endif
        default: return dequantize_row_scalar();
    }
}

}  // namespace

void dequantize(const DequantizeProblem& problem, Isa isa, [[maybe_unused]] int threads) {
    const DequantizeRow row = choose(isa);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t r = 0; r < problem.rows; ++r) row(problem, r);
}

}  // namespace dither
