// Weights on their way from memory while those before them are multiplied. Rows that are read side by side are a pattern that processors foresee badly, and
// scales and zero points are streams of their own. What is read once goes past the second cache, which keeps what comes again.
// Bytes under a mask are not foreseen at all: whole vectors want to be loaded as such. Include only in files compiled for AVX-512.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "packed_weights.hpp"

namespace {

// Written so that no loop of it counts as doing nothing, which compilers leave out.
inline void fetch(const void* at) { asm volatile("prefetchnta %0" : : "m"(*static_cast<const char*>(at))); }

inline void fetch(const void* from, int64_t bytes) {
    const char* const first = static_cast<const char*>(from);
    for (int64_t i = 0; i < bytes; i += 64) fetch(first + i);
}

// What to fetch: the same place so many rows on, whole tiles of rows of which some are read side by side.
struct Ahead {
    int64_t rows, bytes;

    Ahead(int64_t row_bytes, int64_t side_by_side) {
        constexpr int64_t least = 8192;  // what comes from memory while so many are multiplied
        const int64_t tile = row_bytes * side_by_side;
        rows = tile ? (least + tile - 1) / tile * side_by_side : 0;
        bytes = rows * row_bytes;
    }
};

// Scales and zero points of so many rows, which need not be there. `w`: a `PackedWeights`, or what names the same.
template <class Weights>
void fetch_grid(const Weights& w, int64_t row, int64_t count) {
    const int64_t bytes = bytes_of(w.scale_type);
    fetch(static_cast<const char*>(w.scale) + row * w.groups * bytes, count * w.groups * bytes);
    if (w.zero) fetch(w.zero + row * w.groups, count * w.groups);
}

}  // namespace
