#include "gram.hpp"

#include <algorithm>

#include "scratch.hpp"

namespace dither {

namespace {

constexpr int64_t chunk = 512;  // rows whose products are summed in float32; a packed tile of 48 columns then fits L2 many times

GramKernel choose(Isa isa, RowType type) {
    switch (isa) {
#ifdef DITHER_X86
        case Isa::avx512: return type == RowType::bfloat16 && has_avx512_bf16() ? gram_kernel_avx512bf16() : gram_kernel_avx512(type);
        case Isa::avx2: return gram_kernel_avx2(type);
#endif
        default: return gram_kernel_scalar(type);
    }
}

}  // namespace

void gram_update(double* hessian, const void* x, RowType type, int64_t rows, int64_t columns, Isa isa, [[maybe_unused]] int threads) {
    if (rows == 0 || columns == 0) return;
    const GramKernel kernel = choose(isa, type);
    const int64_t panels = (columns + panel_columns - 1) / panel_columns;
    const int64_t tiles = (panels + kernel.tile_panels - 1) / kernel.tile_panels;
    const int64_t deepest = (std::min(rows, chunk) + kernel.row_pair - 1) / kernel.row_pair;
    const int64_t element = type == RowType::float32 ? 4 : 2;
    const Scratch memory = allocate(sizeof(float) * panels * panel_columns * deepest);
    float* const packed = reinterpret_cast<float*>(memory.get());
    threads = static_cast<int>(std::clamp<int64_t>(threads, 1, tiles));

#pragma omp parallel num_threads(threads)
    for (int64_t first = 0; first < rows; first += chunk) {
        const int64_t depth = std::min(chunk, rows - first);
        const int64_t lanes_deep = (depth + kernel.row_pair - 1) / kernel.row_pair;
        const int64_t stride = lanes_deep * panel_columns;  // of a packed panel
        const char* from = static_cast<const char*>(x) + first * columns * element;
#pragma omp for schedule(static)
        for (int64_t p = 0; p < panels; ++p) kernel.pack(from, depth, columns, p * panel_columns, packed + p * stride);

        // a column of tiles goes down to the diagonal: the longest first
#pragma omp for schedule(dynamic, 1)
        for (int64_t t = 0; t < tiles; ++t) {
            const int64_t right = (tiles - 1 - t) * kernel.tile_panels;
            const int64_t j = right * panel_columns;
            const int64_t cols = std::min(columns - j, kernel.tile_panels * panel_columns);
            for (int64_t i = 0; i < j + cols; i += kernel.tile_rows) {
                const float* left = packed + (i / panel_columns) * stride + i % panel_columns;
                kernel.tile(left, packed + right * stride, stride, lanes_deep, hessian + i * columns + j, columns,
                            std::min(kernel.tile_rows, columns - i), cols);
            }
        }
    }
}

void gram_mirror(double* hessian, int64_t columns, [[maybe_unused]] int threads) {
    constexpr int64_t side = 32;
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
    for (int64_t i0 = 0; i0 < columns; i0 += side)
        for (int64_t j0 = i0; j0 < columns; j0 += side)
            for (int64_t i = i0; i < std::min(i0 + side, columns); ++i)
                for (int64_t j = std::max(j0, i + 1); j < std::min(j0 + side, columns); ++j) hessian[j * columns + i] = hessian[i * columns + j];
}

}  // namespace dither
