// tiles.hpp in plain C++, in the order of sums that Intel's manual gives for TDPBF16PS and TDPBSUD: for tests of what is built from tiles where there are none. Rows
// that a configuration lacks are neither read nor written; use of a tile without one stops the process.
#pragma once

#include <bit>
#include <cmath>
#include <cstdlib>
#include <cstring>

#include "tiles.hpp"

namespace {

struct TileState {
    TileConfig config;
    uint8_t data[8][tile_rows][4 * tile_lanes];
};
thread_local TileState tiles;

struct EmulatedTiles {
    static void configure(const TileConfig& config) {
        if (config.palette != 1 || config.start != 0) std::abort();
        std::memset(&tiles, 0, sizeof(tiles));
        tiles.config = config;
    }
    static void release() { std::memset(&tiles, 0, sizeof(tiles)); }

    template <int t>
    static void zero() {
        check(t);
        std::memset(tiles.data[t], 0, sizeof(tiles.data[t]));
    }
    template <int t>
    static void load(const void* from, int64_t stride) {
        check(t);
        zero<t>();
        for (int r = 0; r < tiles.config.rows[t]; ++r) std::memcpy(tiles.data[t][r], static_cast<const char*>(from) + r * stride, tiles.config.row_bytes[t]);
    }
    template <int t>
    static void store(void* to, int64_t stride) {
        check(t);
        for (int r = 0; r < tiles.config.rows[t]; ++r) std::memcpy(static_cast<char*>(to) + r * stride, tiles.data[t][r], tiles.config.row_bytes[t]);
    }
    template <int m, int n>
    static void multiply() {
        constexpr int s = sums_tile(m, n), x = x_tile(m), w = w_tile(n);
        const TileConfig& c = tiles.config;
        if (c.rows[s] != c.rows[x] || c.row_bytes[s] != c.row_bytes[w] || c.row_bytes[x] / 4 != c.rows[w] || c.rows[x] == 0) std::abort();
        for (int r = 0; r < c.rows[x]; ++r)
            for (int j = 0; j < c.row_bytes[w] / 4; ++j) {
                float even = 0, odd = 0, sum;
                for (int k = 0; k < c.rows[w]; ++k) {
                    even = std::fma(number(x, r, 2 * k), number(w, k, 2 * j), even);
                    odd = std::fma(number(x, r, 2 * k + 1), number(w, k, 2 * j + 1), odd);
                }
                std::memcpy(&sum, &tiles.data[s][r][4 * j], 4);
                sum += even + odd;
                std::memcpy(&tiles.data[s][r][4 * j], &sum, 4);
            }
    }

    template <int m, int n>
    static void multiply_bytes() {
        constexpr int s = sums_tile(m, n), x = x_tile(m), w = w_tile(n);
        const TileConfig& c = tiles.config;
        if (c.rows[s] != c.rows[x] || c.row_bytes[s] != c.row_bytes[w] || c.row_bytes[x] / 4 != c.rows[w] || c.rows[x] == 0) std::abort();
        for (int r = 0; r < c.rows[x]; ++r)
            for (int j = 0; j < c.row_bytes[w] / 4; ++j) {
                uint32_t sum;  // it wraps
                std::memcpy(&sum, &tiles.data[s][r][4 * j], 4);
                for (int k = 0; k < c.rows[w]; ++k)
                    for (int b = 0; b < 4; ++b)
                        sum += static_cast<uint32_t>(static_cast<int8_t>(tiles.data[x][r][4 * k + b]) * static_cast<int>(tiles.data[w][k][4 * j + b]));
                std::memcpy(&tiles.data[s][r][4 * j], &sum, 4);
            }
    }

private:
    static void check(int t) {
        if (tiles.config.palette != 1 || tiles.config.rows[t] == 0) std::abort();
    }
    static float number(int t, int row, int i) {
        uint16_t bits;
        std::memcpy(&bits, &tiles.data[t][row][2 * i], 2);
        return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16);
    }
};

}  // namespace
