#include "gptq.hpp"

#ifdef _OPENMP
#include <omp.h>
#endif

#include <algorithm>

#include "scratch.hpp"

namespace dither {

namespace {

template <class T>
GptqKernel<T> choose(Isa isa) {
    switch (isa) {
#ifdef DITHER_X86
        case Isa::avx512: return gptq_kernel_avx512<T>();
        case Isa::avx2: return gptq_kernel_avx2<T>();
#endif
        default: return gptq_kernel_scalar<T>();
    }
}

int thread_index() {
#ifdef _OPENMP
    return omp_get_thread_num();
#else
    return 0;
#endif
}

}  // namespace

template <class T>
void gptq(GptqProblem<T> problem, const T* factor, Isa isa, [[maybe_unused]] int threads) {
    const GptqKernel<T> kernel = choose<T>(isa);
    const int64_t I = problem.columns, N = kernel.panel, panels = (I + N - 1) / N;
    const int64_t tiles = (problem.rows + kernel.tile_rows - 1) / kernel.tile_rows;
    if (I == 0 || tiles == 0) {
        std::fill_n(problem.loss, problem.rows, 0.0);
        return;
    }
    threads = static_cast<int>(std::clamp<int64_t>(threads, 1, tiles));

    // Everything is allocated before the threads start: no exception may leave a parallel region.
    const std::size_t tile_bytes =
        round_up(kernel.tile_rows * (sizeof(T) * (I + (problem.kind == GridKind::mixed ? 5 : 2) * problem.groups) + I));
    const Scratch packed_memory = allocate(sizeof(T) * panel_offset(panels, N));
    const Scratch tile_memory = allocate(tile_bytes * threads);
    T* const packed = reinterpret_cast<T*>(packed_memory.get());
    problem.packed_factor = packed;

#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(dynamic, 1)
        for (int64_t q = 0; q < panels; ++q) {
            const int64_t panel = panels - 1 - q;  // the longest first
            const int64_t width = std::min(N, I - panel * N);
            T* to = packed + panel_offset(panel, N);
            for (int64_t k = 0; k < (panel + 1) * N; ++k, to += N) {
                const bool inside = k < I;
                for (int64_t j = 0; j < N; ++j) to[j] = inside && j < width ? factor[k * I + panel * N + j] : T(0);
            }
        }
#pragma omp for schedule(dynamic, 1)
        for (int64_t t = 0; t < tiles; ++t) kernel.tile(problem, t * kernel.tile_rows, tile_memory.get() + tile_bytes * thread_index());
    }
}

template void gptq(GptqProblem<float>, const float*, Isa, int);
template void gptq(GptqProblem<double>, const double*, Isa, int);

}  // namespace dither
