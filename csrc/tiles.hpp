// Two-dimensional registers for products of bfloat16 and of bytes (Intel's AMX): eight tiles of up to 16 rows of 64 bytes, used as 2 x 2 tiles of sums, two of x and
// two of W. Two implementations have these functions (`tiles_amx.hpp`, `tiles_emulated.hpp`), t, m and n being constants:
//     configure(config)       before anything else on a thread; release() after
//     zero<t>()  load<t>(from, stride)  store<t>(to, stride)       rows `stride` bytes apart
//     multiply_bytes<m, n>()  int32 sums (m, n) += signed bytes of x m times unsigned bytes of W n: sum[r][c] += sum_k x[r][4k + j] w[k][4c + j], j < 4
//     multiply<m, n>()        sums (m, n) += x m times W n: sum[r][c] += sum_k x[r][2k] w[k][2c] + x[r][2k + 1] w[k][2c + 1]
#pragma once

#include <cstdint>

namespace {

constexpr int tile_rows = 16, tile_lanes = 16;  // of 32 bits

// Numbers of the tiles: sums 0 .. 3, x 4 and 5, W 6 and 7.
constexpr int sums_tile(int m, int n) { return 2 * m + n; }
constexpr int x_tile(int m) { return 4 + m; }
constexpr int w_tile(int n) { return 6 + n; }

struct alignas(64) TileConfig {  // as ldtilecfg reads it
    uint8_t palette, start, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
};
static_assert(sizeof(TileConfig) == 64);

// For `count` rows of x, 1 .. 32: two tiles of them, or one.
constexpr TileConfig config_of(int count) {
    TileConfig c{};
    c.palette = 1;
    for (int t = 0; t < 8; ++t) {
        c.row_bytes[t] = 4 * tile_lanes;
        c.rows[t] = tile_rows;
    }
    const int m = count > tile_rows ? 1 : 0, last = count - m * tile_rows;
    c.rows[x_tile(m)] = c.rows[sums_tile(m, 0)] = c.rows[sums_tile(m, 1)] = static_cast<uint8_t>(last);
    return c;
}

struct TileConfigs {
    TileConfig of[2 * tile_rows + 1];
};

// Constants in memory, not built where they are used: the compiler knows of only eight of the bytes that ldtilecfg reads, and may leave out stores of the
// others.
constexpr TileConfigs tile_configs = [] {
    TileConfigs all{};
    for (int count = 1; count <= 2 * tile_rows; ++count) all.of[count] = config_of(count);
    return all;
}();

}  // namespace
