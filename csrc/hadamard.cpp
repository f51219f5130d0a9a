#include "hadamard.hpp"

#include <algorithm>
#include <cmath>

#include "scratch.hpp"

namespace dither {

namespace {

constexpr int64_t least_work = 1 << 15;  // numbers a thread; waking one costs some microseconds

HadamardRow choose(Isa isa) {
    switch (isa) {
#ifdef DITHER_X86
        case Isa::avx512: return hadamard_row_avx512();
        case Isa::avx2: return hadamard_row_avx2();
#endif
        default: return hadamard_row_scalar();
    }
}

}  // namespace

void hadamard(HadamardProblem problem, Isa isa, [[maybe_unused]] int threads) {
    problem.scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(problem.columns)));
    const HadamardRow row = choose(isa);
    const int64_t share = problem.rows * problem.columns / least_work;
    threads = static_cast<int>(std::clamp<int64_t>(threads, 1, std::max<int64_t>(share, 1)));
#pragma omp parallel num_threads(threads)
    {
        const Scratch memory = allocate(2 * sizeof(float) * (problem.columns + hadamard_lanes));
        float* const buffers = reinterpret_cast<float*>(memory.get());
#pragma omp for schedule(static)
        for (int64_t r = 0; r < problem.rows; ++r) row(problem, r, buffers);
    }
}

}  // namespace dither
