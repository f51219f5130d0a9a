#include "codebook_matmul.hpp"

#include <algorithm>

#include "scratch.hpp"

namespace dither {

namespace {

CodebookRows choose(int64_t width, Isa isa) {
    switch (isa) {
#ifdef DITHER_X86
        case Isa::avx512: return codebook_rows_avx512(width);
        case Isa::avx2: return codebook_rows_avx2(width);
#endif
        default: return codebook_rows_scalar(width);
    }
}

void prepare(const CodebookMatmul& p, float* ready, float* offset) {
    for (int64_t first = 0, tile; first < p.tokens; first += tile) {
        tile = tile_of(p.tokens - first);
        for (int64_t t = first; t < first + tile; ++t) {
            float* const to = ready + first * p.count + (t - first);
            if (t >= p.tokens) {
                for (int64_t j = 0; j < p.count; ++j) to[j * tile] = 0;
                continue;
            }
            const float* const x = p.x + t * p.columns;
            float lanes[8] = {};
            for (int64_t j = 0; j < p.count; ++j) {
                const int64_t at = p.place ? p.place[j] : j;
                to[j * tile] = p.scale ? x[at] * p.scale[at] : x[at];
                if (p.bias) lanes[j % 8] += x[at] * p.bias[at];
            }
            offset[t] = ((lanes[0] + lanes[4]) + (lanes[1] + lanes[5])) + ((lanes[2] + lanes[6]) + (lanes[3] + lanes[7]));
        }
    }
}

}  // namespace

void codebook_matmul(CodebookMatmul p, Isa isa, [[maybe_unused]] int threads) {
    if (p.rows == 0 || p.tokens == 0) return;
    const CodebookRows rows = choose(p.width, isa);
    const int64_t tokens = tiled(p.tokens);
    const Scratch scratch = allocate(sizeof(float) * tokens * (p.count + 1));
    float* const ready = reinterpret_cast<float*>(scratch.get());
    prepare(p, ready, ready + tokens * p.count);
    p.ready = ready;
    p.offset = ready + tokens * p.count;
    const int64_t vectors = (p.rows + p.v - 1) / p.v, blocks = (vectors + book_rows - 1) / book_rows;
    threads = static_cast<int>(std::clamp<int64_t>(threads, 1, blocks));
    const std::size_t own = round_up(sizeof(float) * tokens * book_rows * p.width);
    const Scratch totals = allocate(own * threads);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int t = 0; t < threads; ++t) {
        const int64_t first = blocks * t / threads * book_rows, last = std::min(blocks * (t + 1) / threads * book_rows, vectors);
        rows(p, first, last, reinterpret_cast<float*>(totals.get() + own * t));
    }
}

}  // namespace dither
