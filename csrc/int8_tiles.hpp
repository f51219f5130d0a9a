// Rows of int8_many.hpp by tiles (tiles.hpp), 32 or 16 tokens at a time on two vectors of outputs. A panel's codes are laid out as tiles of W are and q
// as tiles of x, so both are loaded as they are; groups are padded to whole tiles, with zeros in q. The sums of a group leave the tiles as int32, so
// numbers are those of `tile` to the last bit.
#pragma once

#include "int8_many.hpp"
#include "tiles.hpp"

namespace {

template <class Tiles>
struct ByteTiles {
    static constexpr int depth = 4 * tile_lanes;  // columns in a tile

    template <class K, int M, bool paired>
    static void tokens(const dither::Int8Matmul& p, const Panel& panel, int64_t t, int c0) {
        using Int = typename K::Int;
        using Float = typename K::Float;
        constexpr int64_t L = Int::lanes, C = K::vectors;
        static_assert(L == tile_lanes && C % 2 == 0);
        alignas(64) int32_t sums[M * tile_rows][2][L];
        alignas(64) float totals[M * tile_rows][2][L];
        for (int m = 0; m < M * tile_rows; ++m)
            for (int n = 0; n < 2; ++n) total_before<K>(panel, t + m, c0 + n).store(totals[m][n]);
        const uint8_t* codes = panel.codes + 4 * c0 * L;
        const int32_t* pointed = panel.pointed + c0 * L;
        for (int64_t g = panel.first; g < panel.last; ++g, codes += p.padded * C * L, pointed += C * L) {
            group<M>(codes, 4 * C * L, p.q + t * p.q_stride + g * p.padded, p.q_stride, p.padded, &sums[0][0][0]);
            for (int n = 0; n < 2; ++n) {
                const GroupGrid<K, paired> grid(p, panel, g, c0 + n, pointed + n * L);
                for (int m = 0; m < M * tile_rows; ++m)
                    grid.add(p, t + m, Int::load(sums[m][n]), Float::load(totals[m][n])).store(totals[m][n]);
            }
        }
        for (int m = 0; m < M * tile_rows; ++m)
            for (int n = 0; n < 2; ++n) put_total<K>(p, panel, t + m, c0 + n, Float::load(totals[m][n]));
    }

    // From `t` on as many as fill tiles; the first that is left.
    template <class K, bool paired>
    static int64_t all(const dither::Int8Matmul& p, const Panel& panel, int64_t t, int64_t last) {
        if (last - t < tile_rows) return t;
        Tiles::configure(tile_configs.of[2 * tile_rows]);
        for (; last - t >= 2 * tile_rows; t += 2 * tile_rows)
            for (int c = 0; c < K::vectors; c += 2) tokens<K, 2, paired>(p, panel, t, c);
        for (; last - t >= tile_rows; t += tile_rows)
            for (int c = 0; c < K::vectors; c += 2) tokens<K, 1, paired>(p, panel, t, c);
        Tiles::release();
        return t;
    }

private:
    template <int M>
    static void group(const uint8_t* codes, int64_t codes_stride, const int8_t* q, int64_t q_stride, int64_t columns, int32_t* sums) {
        const auto each = [](auto f) {  // of the tiles of sums
            f.template operator()<0, 0>();
            f.template operator()<0, 1>();
            if constexpr (M > 1) f.template operator()<1, 0>();
            if constexpr (M > 1) f.template operator()<1, 1>();
        };
        each([]<int m, int n>() { Tiles::template zero<sums_tile(m, n)>(); });
        for (int64_t k = 0; k < columns; k += depth, codes += tile_rows * codes_stride) {
            Tiles::template load<w_tile(0)>(codes, codes_stride);
            Tiles::template load<w_tile(1)>(codes + 4 * tile_lanes, codes_stride);
            Tiles::template load<x_tile(0)>(q + k, q_stride);
            if constexpr (M > 1) Tiles::template load<x_tile(1)>(q + tile_rows * q_stride + k, q_stride);
            each([]<int m, int n>() { Tiles::template multiply_bytes<m, n>(); });
        }
        each([&]<int m, int n>() {
            Tiles::template store<sums_tile(m, n)>(sums + (m * tile_rows * 2 + n) * tile_lanes, 2 * 4 * tile_lanes);
        });
    }
};

}  // namespace
