#include "attention.hpp"

#include <algorithm>
#include <stdexcept>

#include "cpu.hpp"
#include "scratch.hpp"

namespace dither {

namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

AttentionKernel choose() {
#ifdef DITHER_X86
    if (has_avx512_bf16()) return attention_kernel_avx512bf16();
#endif
    throw std::runtime_error("causal attention: this processor has no AVX512_BF16");
}

}  // namespace

AttentionLayout attention_layout(const AttentionProblem& p) {
    AttentionLayout layout{};
    layout.key_panels = ceil_div(p.keys(), 16);
    layout.value_panels = ceil_div(p.value_width, 16);
    layout.key_pairs = layout.key_panels * 8;
    layout.key_lanes = layout.key_panels * (p.width / 2) * 16;
    layout.value_lanes = layout.value_panels * layout.key_pairs * 16;
    layout.stride = ceil_div(p.keys(), 64) * 64;
    return layout;
}

void attention(const AttentionProblem& p, [[maybe_unused]] int threads) {
    const AttentionKernel kernel = choose();
    const AttentionLayout layout = attention_layout(p);
    const int64_t pairs = p.batch * p.groups, lanes = layout.key_lanes + layout.value_lanes;
    const int64_t blocks = ceil_div(p.length, attention_rows), shared = p.heads / p.groups;
    const int64_t tasks = p.batch * p.heads * blocks;
    if (tasks == 0 || p.value_width == 0) return;
    const Scratch memory = allocate(sizeof(uint32_t) * lanes * pairs);
    uint32_t* const packed = reinterpret_cast<uint32_t*>(memory.get());
    threads = static_cast<int>(std::clamp<int64_t>(threads, 1, tasks));

#pragma omp parallel num_threads(threads)
    {
        const int64_t numbers = attention_tile * layout.stride;
        const Scratch own = allocate((sizeof(float) + sizeof(uint16_t)) * numbers);
        float* const logits = reinterpret_cast<float*>(own.get());
        uint16_t* const probabilities = reinterpret_cast<uint16_t*>(logits + numbers);
#pragma omp for schedule(static)
        for (int64_t i = 0; i < pairs; ++i) {
            uint32_t* const keys = packed + i * lanes;
            kernel.pack(p, layout, i / p.groups, i % p.groups, keys, keys + layout.key_lanes);
        }
        // the blocks that see most keys first; heads that share keys behind one another
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < tasks; ++task) {
            const int64_t block = blocks - 1 - task / (p.batch * p.heads), of = task % (p.batch * p.heads);
            const int64_t b = of / p.heads, h = of % p.heads, first = block * attention_rows;
            const uint32_t* const keys = packed + (b * p.groups + h / shared) * lanes;
            kernel.attend(p, layout, b, h, first, std::min(attention_rows, p.length - first), keys, keys + layout.key_lanes, logits, probabilities);
        }
    }
}

}  // namespace dither
