// One row of round.hpp, written once for every vector type. As many groups as a vector has lanes go together: their ranges, then their
// grids (a lane each), then their values, while the weights are still in the first cache. The last vector of a group overlaps the one
// before it; a group shorter than a vector is padded with zeros, which every range holds anyway.
#pragma once

#include <cstring>

#include "round.hpp"

namespace {

using dither::RoundProblem;
using dither::ScaleType;

// rne(clamp(x, lo, hi)) for whole lo and hi below 2^22, which is clamp(rne(x), lo, hi); a zero is positive
template <class V>
V whole(V x, V lo, V hi) {
    const V round_to = V::set1(1.5f * 0x1p23f);
    return V::clamp(x, lo, hi) + round_to - round_to;
}

// s >= 0 as its storage type holds it
template <class V>
V stored(V s, const ScaleType& type) {
    s = V::clamp(s, V::set1(type.smallest), V::set1(type.largest));
    if (type.round_to == 0.0f) return s;
    const V unit = V::max(V::power_of_two(s), V::set1(type.smallest_normal)), round_to = V::set1(type.round_to);
    return (s / unit + round_to - round_to) * unit;  // all but the first sum is exact
}

// The smallest and largest of w[0 .. n) and 0; `check` becomes NaN where one of them is not finite.
template <class V>
void range(const float* w, int64_t n, float& lo, float& hi, V& check) {
    constexpr int L = V::lanes;
    const V zero = V::set1(0.0f);
    V low = zero, high = zero;
    for (int64_t i = 0; i < n; i += L) {
        const V x = V::load(w + (i + L <= n ? i : n - L));
        low = V::min(low, x);
        high = V::max(high, x);
        check = V::fmadd(x, zero, check);
    }
    lo = low.least();
    hi = high.greatest();
}

// to[0 .. n) = s clamp(rne(w / s), lo, hi)
template <class V>
void round_to_grid(const float* w, int64_t n, float s, float lo, float hi, float* to) {
    constexpr int L = V::lanes;
    const V scale = V::set1(s), lowest = V::set1(lo), highest = V::set1(hi);
    for (int64_t i = 0; i < n; i += L) {
        const int64_t at = i + L <= n ? i : n - L;
        (whole(V::load(w + at) / scale, lowest, highest) * scale).store(to + at);
    }
}

template <class V>
bool all_zero(V check) {
    float checks[V::lanes];
    check.store(checks);
    bool zero = true;
    for (int l = 0; l < V::lanes; ++l) zero = zero && checks[l] == 0.0f;
    return zero;
}

template <class V>
bool round_piece(const dither::GridProblem& p, int64_t first, int64_t count) {
    constexpr int L = V::lanes;
    const V zero = V::set1(0.0f);
    V check = zero;
    if (count < L) {
        float padded[L] = {};
        std::memcpy(padded, p.x + first, count * sizeof(float));
        check = V::fmadd(V::load(padded), zero, check);
        round_to_grid<V>(padded, L, p.scale, p.lowest, p.highest, padded);
        std::memcpy(p.values + first, padded, count * sizeof(float));
        return all_zero(check);
    }
    for (int64_t i = 0; i < count; i += L) check = V::fmadd(V::load(p.x + first + (i + L <= count ? i : count - L)), zero, check);
    round_to_grid<V>(p.x + first, count, p.scale, p.lowest, p.highest, p.values + first);
    return all_zero(check);
}

template <class V>
bool round_row(const RoundProblem& p, int64_t row) {
    constexpr int L = V::lanes;
    const float* const from = p.weight + row * p.columns;
    float* const to = p.values + row * p.columns;
    const V zero = V::set1(0.0f), code_max = V::set1(p.code_max);
    V check = zero;

    for (int64_t first = 0; first < p.columns; first += L * p.group) {
        float lo[L] = {}, hi[L] = {}, scale[L], lowest[L], highest[L];  // one a group
        const auto each_group = [&](auto act) {
            for (int64_t k = 0, i = first; k < L && i < p.columns; ++k, i += p.group)
                act(k, i, p.columns - i < p.group ? p.columns - i : p.group);
        };

        each_group([&](int64_t k, int64_t i, int64_t n) {
            if (n >= L) return range(from + i, n, lo[k], hi[k], check);
            float padded[L] = {};
            std::memcpy(padded, from + i, n * sizeof(float));
            range(padded, L, lo[k], hi[k], check);
        });

        // a group of zeros: any scale does
        const V low = V::load(lo), s = stored((V::load(hi) - low) / code_max, p.scale);
        const V z = whole((zero - low) / s, zero, code_max);
        s.store(scale);
        (zero - z).store(lowest);
        (code_max - z).store(highest);

        each_group([&](int64_t k, int64_t i, int64_t n) {
            if (n >= L) return round_to_grid<V>(from + i, n, scale[k], lowest[k], highest[k], to + i);
            float padded[L] = {};
            std::memcpy(padded, from + i, n * sizeof(float));
            round_to_grid<V>(padded, L, scale[k], lowest[k], highest[k], padded);
            std::memcpy(to + i, padded, n * sizeof(float));
        });
    }

    return all_zero(check);
}

}  // namespace
