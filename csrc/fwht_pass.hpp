// The loops of fwht.hpp, written once for every vector type.
#pragma once

#include <cstring>

#include "fwht.hpp"
#include "outer.hpp"
#include "walsh.hpp"

namespace {

template <class V>
void fwht_small(typename V::Real* x, int64_t count, int64_t first, int64_t end, typename V::Real scale) {
    using Real = typename V::Real;
    constexpr int L = V::lanes;
    int64_t i = 0;
    for (; i + L <= count; i += L) within(V::load(x + i) * V::set1(scale), first, end).store(x + i);
    if (i == count) return;
    Real last[L] = {};
    std::memcpy(last, x + i, (count - i) * sizeof(Real));
    within(V::load(last) * V::set1(scale), first, end).store(last);
    std::memcpy(x + i, last, (count - i) * sizeof(Real));
}

// `now` levels above the `done` ones of a tile [2^levels, wide], from one place to another
template <class V, bool streamed>
void tile_levels(const typename V::Real* from, int64_t from_stride, typename V::Real* to, int64_t to_stride, int done, int now, int levels,
                 int64_t wide) {
    const int64_t step = int64_t(1) << done;
    for (int64_t a = 0; a < int64_t(1) << levels; a += step << now)
        for (int64_t r = a; r < a + step; ++r)
            pass<V, streamed>(now, from + r * from_stride, from_stride * step, to + r * to_stride, to_stride * step, wide);
}

// The tile at x, in passes: into the buffer, within it, and back. Its rows lie a power of two apart and push each other out of the caches,
// so what goes back to a long row is streamed, or every line would be read twice.
template <class V, bool streamed>
void tile(typename V::Real* x, int64_t stride, int levels, int64_t wide, typename V::Real* buffer) {
    int done = next_levels<V>(levels);
    tile_levels<V, false>(x, stride, buffer, wide, 0, done, levels, wide);
    while (true) {
        const int now = next_levels<V>(levels - done);
        if (done + now == levels) return tile_levels<V, streamed>(buffer, wide, x, stride, done, now, levels, wide);
        tile_levels<V, false>(buffer, wide, buffer, wide, done, now, levels, wide);
        done += now;
    }
}

template <class V>
void fwht_columns(typename V::Real* x, int64_t stride, int levels, int64_t from, int64_t to, bool streamed, typename V::Real* buffer) {
    constexpr int64_t size = sizeof(typename V::Real), line = 64 / size;
    const int64_t most = (dither::fwht_tile_bytes >> levels) / size, wide = most < dither::fwht_wide_bytes / size ? most : dither::fwht_wide_bytes / size;
    if (levels <= most_levels<V>) {
        pass<V>(levels, x + from, stride, x + from, stride, to - from);
        return;
    }
    for (int64_t c = from; c < to; c += wide) {  // stride and the ends are multiples of `wide`
        if (c + wide < to)
            for (int64_t r = 0; r < int64_t(1) << levels; ++r)
                for (int64_t i = 0; i < wide; i += line) __builtin_prefetch(x + r * stride + c + wide + i, 0, 2);
        if (streamed) tile<V, true>(x + c, stride, levels, wide, buffer);
        else tile<V, false>(x + c, stride, levels, wide, buffer);
    }
    V::fence();
}

template <class V>
void fwht_outer(typename V::Real* x, int64_t stride, const typename V::Real* signs, int64_t d, int64_t from, int64_t to,
                typename V::Real scale, typename V::Real* buffer) {
    using Real = typename V::Real;
    constexpr int L = V::lanes;
    constexpr int64_t wide = dither::fwht_outer_bytes / sizeof(Real);
    for (int64_t c = from; c < to; c += wide) {
        const int64_t width = to - c < wide ? to - c : wide, room = width < L ? L : width;  // narrower than a vector: padded
        for (int64_t j = 0; j < d; ++j) {
            Real* const row = buffer + j * room;
            for (int64_t i = 0; i < width; ++i) row[i] = x[j * stride + c + i] * scale;
            for (int64_t i = width; i < room; ++i) row[i] = 0;
        }
        if (width >= L) {
            multiply_outer<V>(buffer, room, x + c, stride, signs, d, width);
        } else {
            multiply_outer<V>(buffer, room, buffer + d * room, room, signs, d, room);
            for (int64_t j = 0; j < d; ++j) std::memcpy(x + j * stride + c, buffer + (d + j) * room, width * sizeof(Real));
        }
    }
}

template <class V>
dither::FwhtLoops<typename V::Real> fwht_loops() {
    return {V::lanes, fwht_small<V>, walsh<V>, fwht_columns<V>, fwht_outer<V>};
}

}  // namespace
