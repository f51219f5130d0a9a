#include "int8_matmul.hpp"

#include <algorithm>
#include <cstring>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "scratch.hpp"

namespace dither {

namespace {

Int8Kernel choose([[maybe_unused]] Int8Way way, Isa isa) {
    switch (isa) {
#ifdef DITHER_X86
        case Isa::avx512:
            if (!has_avx512_vnni() || !has_avx512_vbmi()) return int8_kernel_avx2();
            if (way == Int8Way::emulated) return int8_kernel_emulated();
            return way == Int8Way::best && has_amx_int8() ? int8_kernel_amx() : int8_kernel_avx512();
        case Isa::avx2: return int8_kernel_avx2();
#endif
        default: return int8_kernel_scalar();
    }
}

int64_t multiple(int64_t n, int64_t of) { return (n + of - 1) / of * of; }

// Behind the tokens: what gives sums of codes.
void add_ones(const Int8Matmul& p) {
    int8_t* const q = p.q + p.tokens * p.q_stride;
    std::memset(q, 0, p.q_stride);
    for (int64_t g = 0; g < p.groups; ++g) {
        const int64_t count = std::min(p.group, p.columns - g * p.group);
        std::memset(q + g * p.padded, 1, count);
        p.sums[p.tokens * p.groups + g] = static_cast<int32_t>(count);
    }
}

void multiply_few(const Int8Matmul& p, const Int8Kernel& kernel, int threads) {
    const int64_t tiles = (p.rows + kernel.lanes - 1) / kernel.lanes;
    threads = static_cast<int>(std::clamp<int64_t>(threads, 1, tiles));
    const std::size_t own = round_up(kernel.few_bytes(p));
    const Scratch scratch = allocate(own * threads);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int t = 0; t < threads; ++t) {
        const int64_t first = tiles * t / threads * kernel.lanes, last = tiles * (t + 1) / threads * kernel.lanes;
        kernel.few(p, first, std::min(last, p.rows), scratch.get() + own * t);
    }
}

// Where there are fewer panels than threads would share evenly, tokens are cut too; each part unpacks its panel again.
void multiply_many(const Int8Matmul& p, const Int8Kernel& kernel, int threads) {
    const int64_t panels = (p.rows + kernel.panel - 1) / kernel.panel, worth = 64;  // tokens that make unpacking cheap
    const int64_t parts = std::max<int64_t>(1, std::min(p.tokens / worth, (4 * threads - 1) / panels + 1));
    const int64_t length = multiple((p.tokens + parts - 1) / parts, kernel.depth > 4 ? 32 : 12), pieces = threads == 1 ? 1 : (p.tokens + length - 1) / length;
    const std::size_t own = round_up(kernel.many_bytes(p));
    const Scratch scratch = allocate(own * threads);
    char* const base = scratch.get();
#pragma omp parallel num_threads(threads)
    {
#ifdef _OPENMP
        char* const mine = base + own * omp_get_thread_num();
#else
        char* const mine = base;
#endif
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < panels * pieces; ++task) {
            const int64_t piece = task % pieces;
            const int64_t first = piece * length, last = pieces == 1 ? p.tokens : std::min(first + length, p.tokens);
            kernel.many(p, task / pieces * kernel.panel, first, last, mine);
        }
    }
}

}  // namespace

bool int8_matmul(Int8Matmul p, Isa isa, [[maybe_unused]] int threads) {
    if (p.rows == 0 || p.tokens == 0) return true;
    const Int8Kernel kernel = choose(p.way, isa);
    const bool few = p.tokens <= few_tokens;
    // `few` takes steps of 4 lanes, which begin where a group does or hold several; `many` takes a few columns at a time
    const int64_t step = 4 * kernel.lanes, width = p.group < p.columns ? p.group : p.columns;
    p.padded = !few ? multiple(width, kernel.depth) : width < step && width % 16 == 0 && step % width == 0 ? width : multiple(width, step);
    p.q_stride = multiple(p.groups * p.padded, step) + step;  // vectors are stored a little beyond the last group
    const std::size_t q_bytes = round_up(p.inputs() * p.q_stride), sum_bytes = round_up(sizeof(int32_t) * p.inputs() * p.groups);
    const std::size_t step_bytes = round_up(sizeof(float) * p.tokens);
    const Scratch memory = allocate(q_bytes + sum_bytes + 2 * step_bytes);
    p.q = reinterpret_cast<int8_t*>(memory.get());
    p.sums = reinterpret_cast<int32_t*>(memory.get() + q_bytes);
    p.steps = reinterpret_cast<float*>(memory.get() + q_bytes + sum_bytes);
    p.points = reinterpret_cast<int32_t*>(memory.get() + q_bytes + sum_bytes + step_bytes);
    bool finite = true;
#pragma omp parallel for schedule(static) num_threads(few ? 1 : threads) reduction(&& : finite)
    for (int64_t t = 0; t < p.tokens; ++t) finite = kernel.round(p, t) && finite;
    if (p.pointed()) add_ones(p);
    if (few)
        multiply_few(p, kernel, threads);
    else
        multiply_many(p, kernel, threads);
    return finite;
}

}  // namespace dither
