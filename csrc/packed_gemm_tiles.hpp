// The products of packed_gemm.hpp by tiles of bfloat16 pairs (tiles.hpp): up to 32 rows of x and 32 rows of W at a time. Sums go on from those of earlier
// blocks. A panel is laid out as a tile of W is, and rows of x as one of x, so both are loaded as they are.
#pragma once

#include "packed_gemm.hpp"
#include "tiles.hpp"

namespace {

// M tiles of x, N panels
template <class Tiles, int M, int N>
void tiles_corner(const float* x, const float* panels, int64_t depth, float* sums, int64_t next, bool earlier) {
    constexpr int64_t P = dither::gemm_panel, bytes = sizeof(float);
    const auto each = [](auto f) {  // of the tiles of sums
        f.template operator()<0, 0>();
        if constexpr (N > 1) f.template operator()<0, 1>();
        if constexpr (M > 1) f.template operator()<1, 0>();
        if constexpr (M > 1 && N > 1) f.template operator()<1, 1>();
    };
    each([&]<int m, int n>() {
        if (earlier)
            Tiles::template load<sums_tile(m, n)>(sums + m * tile_rows * next + n * P, next * bytes);
        else
            Tiles::template zero<sums_tile(m, n)>();
    });
    for (int64_t k = 0; k < depth; k += tile_lanes) {
        Tiles::template load<w_tile(0)>(panels + k * P, P * bytes);
        if constexpr (N > 1) Tiles::template load<w_tile(1)>(panels + (depth + k) * P, P * bytes);
        Tiles::template load<x_tile(0)>(x + k, depth * bytes);
        if constexpr (M > 1) Tiles::template load<x_tile(1)>(x + tile_rows * depth + k, depth * bytes);
        each([]<int m, int n>() { Tiles::template multiply<m, n>(); });
    }
    each([&]<int m, int n>() { Tiles::template store<sums_tile(m, n)>(sums + m * tile_rows * next + n * P, next * bytes); });
}

template <class Tiles>
void tile(const float* x, int64_t tokens, const float* panels, int64_t count, int64_t depth, float* sums, int64_t next, bool earlier) {
    for (int64_t here; tokens > 0; tokens -= here, x += here * depth, sums += here * next) {
        here = tokens < 2 * tile_rows ? tokens : 2 * tile_rows;
        Tiles::configure(tile_configs.of[here]);
        for (int64_t n = 0; n < count; n += 2) {
            const auto corner = here > tile_rows ? (n + 1 < count ? tiles_corner<Tiles, 2, 2> : tiles_corner<Tiles, 2, 1>)
                                                 : (n + 1 < count ? tiles_corner<Tiles, 1, 2> : tiles_corner<Tiles, 1, 1>);
            corner(x, panels + n * depth * dither::gemm_panel, depth, sums + n * dither::gemm_panel, next, earlier);
        }
    }
    Tiles::release();
}

}  // namespace
