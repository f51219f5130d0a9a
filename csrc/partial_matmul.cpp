#include "partial_matmul.hpp"

#include <algorithm>

#include "scratch.hpp"

namespace dither {

namespace {

PartialRows choose([[maybe_unused]] const PartialProblem& w, Isa isa) {
    switch (isa) {
#ifdef DITHER_X86
        case Isa::avx512:
            if (has_avx512_vbmi2())
                if (const PartialRows found = partial_rows_avx512vbmi2(w)) return found;
            return partial_rows_avx512();
        case Isa::avx2: return partial_rows_avx2();
#endif
        default: return partial_rows_scalar();
    }
}

}  // namespace

void partial_matmul(const PartialMatmul& p, Isa isa, [[maybe_unused]] int threads) {
    const PartialRows rows = choose(p.weights, isa);
    const int64_t count = p.weights.rows;
    if (count == 0 || p.tokens == 0) return;
    threads = static_cast<int>(std::clamp<int64_t>(threads, 1, count));
    const std::size_t own = round_up(sizeof(float) * p.weights.columns);
    const Scratch scratch = allocate(own * threads);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int t = 0; t < threads; ++t) rows(p, count * t / threads, count * (t + 1) / threads, reinterpret_cast<float*>(scratch.get() + own * t));
}

}  // namespace dither
