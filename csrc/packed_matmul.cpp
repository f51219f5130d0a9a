#include "packed_matmul.hpp"

#include <algorithm>

#include "scratch.hpp"

namespace dither {

void sum_groups(const PackedMatmul& p, float* to) {
    for (int64_t t = 0; t < p.tokens; ++t)
        for (int64_t g = 0; g < p.groups; ++g, ++to) {
            const float *x = p.x + t * p.columns + g * p.group, *last = std::min(x + p.group, p.x + (t + 1) * p.columns);
            float lanes[8] = {};
            for (; x + 8 <= last; x += 8)
                for (int l = 0; l < 8; ++l) lanes[l] += x[l];
            for (; x < last; ++x) lanes[0] += *x;
            *to = ((lanes[0] + lanes[4]) + (lanes[1] + lanes[5])) + ((lanes[2] + lanes[6]) + (lanes[3] + lanes[7]));
        }
}

PackedKernel packed_kernel(const PackedMatmul& p, Isa isa) {
    switch (isa) {
#ifdef DITHER_X86
        case Isa::avx512:
            if (has_avx512_bf16() && fits_bfloat16(p)) {
                if (const PackedKernel found = packed_kernel_avx512bf16(p); found.rows) return found;
                if (has_avx512_vbmi())
                    if (const PackedKernel found = packed_kernel_avx512vbmi(p); found.rows) return found;
            }
            return packed_kernel_avx512(p);
        case Isa::avx2: return packed_kernel_avx2(p);
#endif
        default: return packed_kernel_scalar(p);
    }
}

void packed_matmul(PackedMatmul p, Isa isa, [[maybe_unused]] int threads) {
    if (p.rows == 0 || p.tokens == 0) return;
    const PackedKernel kernel = packed_kernel(p, isa);
    const Scratch sums = allocate(sizeof(float) * p.tokens * p.groups + cache_line);  // vectors may read past the last one
    if (has_zeros(p)) sum_groups(p, reinterpret_cast<float*>(sums.get()));
    p.sums = reinterpret_cast<const float*>(sums.get());
    const Scratch ready = allocate(kernel.ready_bytes ? kernel.ready_bytes(p) : 0);
    if (kernel.prepare) kernel.prepare(p, ready.get());
    p.ready = ready.get();
    threads = static_cast<int>(std::clamp<int64_t>(threads, 1, p.rows));
    const std::size_t own = round_up(2 * sizeof(float) * (p.groups + 32));
    const Scratch scales = allocate(own * threads);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int t = 0; t < threads; ++t) {
        kernel.rows(p, p.rows * t / threads, p.rows * (t + 1) / threads, reinterpret_cast<float*>(scales.get() + own * t));
    }
}

}  // namespace dither
