#include "dequantize.hpp"

namespace dither {

DequantizeRow row_dequantizer(const DequantizeProblem& p, Isa isa) {
    switch (isa) {
#ifdef DITHER_X86
        case Isa::avx512: return dequantize_row_avx512(p);
        case Isa::avx2: return dequantize_row_avx2(p);
#endif
        default: return dequantize_row_scalar(p);
    }
}

void dequantize(const DequantizeProblem& problem, Isa isa, [[maybe_unused]] int threads) {
    const DequantizeRow row = row_dequantizer(problem, isa);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t r = 0; r < problem.rows; ++r) row(problem, r);
}

}  // namespace dither
