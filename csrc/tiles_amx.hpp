// tiles.hpp by the processor's own. Include only in files compiled for AMX: the names of tiles are part of the instructions, so each is spelt out.
#pragma once

#include <immintrin.h>

#include "tiles.hpp"

namespace {

struct AmxTiles {
    static void configure(const TileConfig& config) { _tile_loadconfig(&config); }
    static void release() { _tile_release(); }

    template <int t>
    static void zero() {
        if constexpr (t == 0) _tile_zero(0);
        if constexpr (t == 1) _tile_zero(1);
        if constexpr (t == 2) _tile_zero(2);
        if constexpr (t == 3) _tile_zero(3);
    }
    template <int t>
    static void load(const void* from, int64_t stride) {
        if constexpr (t == 0) _tile_loadd(0, from, stride);
        if constexpr (t == 1) _tile_loadd(1, from, stride);
        if constexpr (t == 2) _tile_loadd(2, from, stride);
        if constexpr (t == 3) _tile_loadd(3, from, stride);
        if constexpr (t == 4) _tile_loadd(4, from, stride);
        if constexpr (t == 5) _tile_loadd(5, from, stride);
        if constexpr (t == 6) _tile_loadd(6, from, stride);
        if constexpr (t == 7) _tile_loadd(7, from, stride);
    }
    template <int t>
    static void store(void* to, int64_t stride) {
        if constexpr (t == 0) _tile_stored(0, to, stride);
        if constexpr (t == 1) _tile_stored(1, to, stride);
        if constexpr (t == 2) _tile_stored(2, to, stride);
        if constexpr (t == 3) _tile_stored(3, to, stride);
    }
    template <int m, int n>
    static void multiply() {
        if constexpr (m == 0 && n == 0) _tile_dpbf16ps(0, 4, 6);
        if constexpr (m == 0 && n == 1) _tile_dpbf16ps(1, 4, 7);
        if constexpr (m == 1 && n == 0) _tile_dpbf16ps(2, 5, 6);
        if constexpr (m == 1 && n == 1) _tile_dpbf16ps(3, 5, 7);
    }
    template <int m, int n>
    static void multiply_bytes() {
        if constexpr (m == 0 && n == 0) _tile_dpbsud(0, 4, 6);
        if constexpr (m == 0 && n == 1) _tile_dpbsud(1, 4, 7);
        if constexpr (m == 1 && n == 0) _tile_dpbsud(2, 5, 6);
        if constexpr (m == 1 && n == 1) _tile_dpbsud(3, 5, 7);
    }
};

}  // namespace
