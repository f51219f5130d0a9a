#include "packed_gemm.hpp"

#include <algorithm>
#include <atomic>
#include <cstring>

#include "scratch.hpp"

namespace dither {

namespace {

constexpr int64_t most_a_slice = 512;     // rows of x: a block of them and a strip's sums stay in the second cache; each slice decodes anew
constexpr int64_t most_packed = 1 << 19;  // lanes of x that are packed at a time, or a slice: what was just written is still near
constexpr int64_t alone = 1 << 16;        // lanes of x that one thread packs before others have woken

GemmKernel choose(const PackedGemm& p, Isa isa) {
    if (p.bfloat16 && p.way == GemmWay::emulated) return gemm_kernel_emulated();
    switch (isa) {
#ifdef DITHER_X86
        case Isa::avx512: {
            if (!p.bfloat16 || !has_avx512_bf16() || p.way == GemmWay::widened) return gemm_kernel_avx512(p);
            GemmKernel kernel = gemm_kernel_avx512bf16(p);
            if (p.way == GemmWay::pairs) return kernel;
            if (has_avx512_vbmi())
                if (const GemmDecode found = gemm_decode_avx512vbmi(p)) kernel.decode = found;
            if (has_amx_bf16()) kernel.tile = gemm_tile_amx();
            return kernel;
        }
        case Isa::avx2: return gemm_kernel_avx2(p);
#endif
        default: return gemm_kernel_scalar();
    }
}

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// How one call is cut.
struct Plan {
    int64_t lanes, depth, blocks;  // of x and W; of a block; blocks
    int64_t tokens;                // of this call
    int64_t panels, strips;        // of W; parts of W that threads take one at a time
    int64_t slices;                // parts of x, likewise: more than tokens ask for where there are more threads than strips

    int64_t depth_of(int64_t block) const { return block + 1 < blocks ? depth : divide_up(lanes - block * depth, gemm_panel) * gemm_panel; }
    int64_t padded() const { return (blocks - 1) * depth + depth_of(blocks - 1); }  // lanes of a packed row
    int64_t strip(int64_t s) const { return panels * s / strips; }                  // its first panel
    int64_t slice(int64_t s) const { return tokens * s / slices; }
    int64_t widest() const { return divide_up(panels, strips); }
    int64_t tallest() const { return divide_up(tokens, slices); }
};

Plan planned(const PackedGemm& p, const GemmKernel& kernel, int64_t tokens, int threads) {
    Plan plan{};
    plan.lanes = divide_up(p.columns, kernel.columns_a_lane);
    // a tile's panels take three fifths of the first cache, x and sums pass through the rest
    const int64_t deepest = std::clamp<int64_t>(p.l1 * 3 / 5 / (kernel.tile_panels * gemm_panel * 4) / gemm_panel * gemm_panel, 64, 256);
    plan.depth = divide_up(divide_up(plan.lanes, divide_up(plan.lanes, deepest)), gemm_panel) * gemm_panel;
    plan.blocks = divide_up(plan.lanes, plan.depth);
    plan.tokens = tokens;
    plan.panels = divide_up(p.rows, gemm_panel);
    // a strip's sums take an eighth of the second cache, most of which holds the block of x
    const int64_t widest = std::clamp<int64_t>(p.l2 / 8 / (std::min(tokens, most_a_slice) * gemm_panel * 4), kernel.tile_panels, 32);
    plan.strips = std::min(plan.panels, divide_up(divide_up(plan.panels, widest), threads) * threads);
    plan.slices = std::max(divide_up(tokens, most_a_slice), std::min(threads / plan.strips, divide_up(tokens, 64)));
    return plan;
}

// Row t of x, all blocks: to lanes, with zeros behind the last column.
void pack_row(const PackedGemm& p, const GemmKernel& kernel, const Plan& plan, int64_t first, int64_t t, float* packed) {
    const int64_t whole = p.columns / kernel.columns_a_lane;
    const char* const row = static_cast<const char*>(p.x) + (first + t) * p.x_next * (p.bfloat16 ? 2 : 4);
    const bool widen = p.bfloat16 && kernel.columns_a_lane == 1;
    for (int64_t b = 0; b < plan.blocks; ++b) {
        const int64_t at = b * plan.depth, depth = plan.depth_of(b), there = std::clamp<int64_t>(whole - at, 0, depth);
        float* const to = packed + at * plan.tokens + t * depth;
        if (widen) {
            const uint16_t* const narrow = reinterpret_cast<const uint16_t*>(row) + at;
            for (int64_t i = 0; i < there; ++i) to[i] = from_bfloat16(narrow[i]);
        } else {
            std::memcpy(to, row + at * 4, there * 4);
        }
        std::memset(to + there, 0, (depth - there) * 4);
        if (whole < plan.lanes && there < depth && whole >= at) std::memcpy(to + there, row + whole * 4, 2);  // half a pair
    }
}

// One strip of W on one slice of x.
void multiply(const PackedGemm& p, const GemmKernel& kernel, const Plan& plan, int64_t first, int64_t strip, int64_t slice, const float* packed,
              float* sums, float* rows, float* panels) {
    const int64_t panel0 = plan.strip(strip), panel1 = plan.strip(strip + 1), next = (panel1 - panel0) * gemm_panel;
    const int64_t token0 = plan.slice(slice), tokens = plan.slice(slice + 1) - token0;
    for (int64_t b = 0; b < plan.blocks; ++b) {
        const int64_t at = b * plan.depth, depth = plan.depth_of(b);
        const float* const x = packed + at * plan.tokens + token0 * depth;
        for (int64_t panel = panel0; panel < panel1; panel += kernel.tile_panels) {
            const int64_t count = std::min(kernel.tile_panels, panel1 - panel);
            for (int64_t n = 0; n < count; ++n) kernel.decode(p, (panel + n) * gemm_panel, at, depth, rows, panels + n * depth * gemm_panel);
            kernel.tile(x, tokens, panels, count, depth, sums + (panel - panel0) * gemm_panel, next, b > 0);
        }
    }
    const int64_t o = panel0 * gemm_panel, count = std::min(p.rows - o, next), element = p.bfloat16 ? 2 : 4;
    char* y = static_cast<char*>(p.y) + ((first + token0) * p.y_next + o) * element;
    for (int64_t t = 0; t < tokens; ++t, y += p.y_next * element, sums += next) kernel.finish(sums, count, y, p.bfloat16);
}

}  // namespace

void packed_gemm(const PackedGemm& p, Isa isa, int threads) {
    if (p.rows == 0 || p.tokens == 0) return;
    if (p.columns == 0) {
        const int64_t element = p.bfloat16 ? 2 : 4;
        for (int64_t t = 0; t < p.tokens; ++t) std::memset(static_cast<char*>(p.y) + t * p.y_next * element, 0, p.rows * element);
        return;
    }
    const GemmKernel kernel = choose(p, isa);
    const int64_t most_tokens = std::max(most_a_slice, most_packed / divide_up(p.columns, kernel.columns_a_lane) / most_a_slice * most_a_slice);
    const Plan largest = planned(p, kernel, std::min(p.tokens, most_tokens), threads);
    const Scratch x = allocate(sizeof(float) * largest.tokens * largest.padded());
    float* const packed = reinterpret_cast<float*>(x.get());
    const int64_t calls = divide_up(p.tokens, most_tokens);
    for (int64_t call = 0; call < calls; ++call) {
        const int64_t first = p.tokens * call / calls;
        const Plan plan = planned(p, kernel, p.tokens * (call + 1) / calls - first, threads);
        const std::size_t sums = round_up(sizeof(float) * plan.tallest() * plan.widest() * gemm_panel);
        const std::size_t rows = sizeof(float) * gemm_panel * plan.depth, panels = kernel.tile_panels * rows;
        const Scratch memory = allocate((sums + rows + panels) * threads);
        std::atomic<int64_t> task = 0;
        const int packers = plan.tokens * plan.lanes < alone ? 1 : threads;
#pragma omp parallel for schedule(static) num_threads(packers)
        for (int64_t t = 0; t < plan.tokens; ++t) pack_row(p, kernel, plan, first, t, packed);
#pragma omp parallel for schedule(static) num_threads(threads)
        for (int thread = 0; thread < threads; ++thread) {
            char* const own = memory.get() + (sums + rows + panels) * thread;
            for (int64_t i; (i = task++) < plan.strips * plan.slices;)
                multiply(p, kernel, plan, first, i % plan.strips, i / plan.strips, packed, reinterpret_cast<float*>(own),
                         reinterpret_cast<float*>(own + sums), reinterpret_cast<float*>(own + sums + rows));
        }
    }
}

}  // namespace dither
