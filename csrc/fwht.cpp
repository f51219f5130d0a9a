#include "fwht.hpp"

#include <algorithm>
#include <cstdint>

#include "scratch.hpp"

namespace dither {

namespace {

constexpr int64_t least_work = 1 << 15;     // numbers a thread; waking one costs some microseconds
constexpr int64_t strip_bytes = 1 << 13;    // of a row, that one step of a pass over columns takes at most

template <class T>
FwhtLoops<T> choose(Isa isa) {
    switch (isa) {
#ifdef DITHER_X86
        case Isa::avx512: return fwht_loops_avx512<T>();
        case Isa::avx2: return fwht_loops_avx2<T>();
#endif
        default: return fwht_loops_scalar<T>();
    }
}

// Whole rows, each small enough for the cache
template <class T>
void rows(const FwhtProblem<T>& p, const FwhtLoops<T>& loops, int64_t from, int64_t to, T* buffer) {
    const int64_t segment = p.power * p.inner, length = p.d * segment;
    const T scale = p.d > 1 ? T(1) : p.scale;  // the scale is taken first
    if (segment < loops.lanes) {
        for (int64_t r = from; r < to && p.d > 1; ++r) loops.outer(p.x + r * length, segment, p.signs, p.d, 0, segment, p.scale, buffer);
        loops.small(p.x + from * length, (to - from) * length, p.inner, segment, scale);
        return;
    }
    for (int64_t r = from; r < to; ++r) {
        T* const x = p.x + r * length;
        if (p.d > 1) loops.outer(x, segment, p.signs, p.d, 0, segment, p.scale, buffer);
        for (int64_t s = 0; s < p.d; ++s) loops.block(x + s * segment, segment, p.inner, scale);
    }
}

}  // namespace

template <class T>
void fwht(const FwhtProblem<T>& p, Isa isa, [[maybe_unused]] int threads) {
    const FwhtLoops<T> loops = choose<T>(isa);
    const int64_t segment = p.power * p.inner, length = p.d * segment, total = p.rows * length;
    const int64_t block = std::min<int64_t>(segment, fwht_block_bytes / sizeof(T)), strip = strip_bytes / sizeof(T);
    const int64_t buffer_bytes = std::max(2 * p.d * fwht_outer_bytes, segment > block ? fwht_tile_bytes : 0);
    const bool streamed = total * static_cast<int64_t>(sizeof(T)) > fwht_cached_bytes && reinterpret_cast<uintptr_t>(p.x) % cache_line == 0;
    threads = static_cast<int>(std::clamp<int64_t>(threads, 1, std::max<int64_t>(total / least_work, 1)));
#pragma omp parallel num_threads(threads)
    {
        const Scratch memory = allocate(buffer_bytes);
        T* const buffer = reinterpret_cast<T*>(memory.get());
        if (length * static_cast<int64_t>(sizeof(T)) <= fwht_block_bytes) {
            const int64_t together = std::max<int64_t>(1, least_work / 8 / length);
#pragma omp for schedule(static)
            for (int64_t r = 0; r < p.rows; r += together) rows(p, loops, r, std::min(p.rows, r + together), buffer);
        } else {
            if (p.d > 1) {
                const int64_t strips = (segment + strip - 1) / strip;
#pragma omp for schedule(static)
                for (int64_t i = 0; i < p.rows * strips; ++i) {
                    const int64_t c = i % strips * strip;
                    loops.outer(p.x + i / strips * length, segment, p.signs, p.d, c, std::min(segment, c + strip), p.scale, buffer);
                }
            }
#pragma omp for schedule(static)
            for (int64_t i = 0; i < total / block; ++i) loops.block(p.x + i * block, block, p.inner, p.d > 1 ? T(1) : p.scale);
            for (int64_t h = block; h < segment;) {
                const int levels = std::min(fwht_column_levels, static_cast<int>(__builtin_ctzll(segment / h)));
                const int64_t width = std::min(strip, h), strips = h / width;
#pragma omp for schedule(static)
                for (int64_t i = 0; i < total / (h << levels) * strips; ++i) {
                    const int64_t c = i % strips * width;
                    loops.columns(p.x + i / strips * (h << levels), h, levels, c, c + width, streamed, buffer);
                }
                h <<= levels;
            }
        }
    }
}

template void fwht<float>(const FwhtProblem<float>&, Isa, int);
template void fwht<double>(const FwhtProblem<double>&, Isa, int);

}  // namespace dither
