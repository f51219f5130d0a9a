// One row of x to integers of a signed byte, for int8_matmul.hpp, written once for every vector type. What `Int` of dither.formats gives by token:
// with lo = min(x, 0), hi = max(x, 0), peak = max(-lo, hi), and steps as their storage type holds them,
//     symmetric     s = peak / divisor                                q = clamp(rne(x / s), lowest, highest)
//     extremum      s = e / -divisor, e the largest with its sign     likewise
//     asymmetric    s = (hi - lo) / N, z = clamp(rne(-lo / s), 0, N)  q = clamp(rne(x / s) + z, 0, N) - input_middle,  point = z - input_middle
#pragma once

#include <cstring>

#include "int8_matmul.hpp"
#include "round_row.hpp"

namespace {

// The number all of whose lanes are whole and small enough for the sum to be one number in any order.
template <class V>
float total(V sum) {
    if constexpr (V::lanes > 8) sum = sum + V::template exchange<8>(sum);
    if constexpr (V::lanes > 4) sum = sum + V::template exchange<4>(sum);
    sum = sum + V::template exchange<2>(sum);
    sum = sum + V::template exchange<1>(sum);
    float lanes[V::lanes];
    sum.store(lanes);
    return lanes[0];
}

template <class V>
float stored_one(float s, const dither::ScaleType& type) {
    float lanes[V::lanes];
    stored(V::set1(s), type).store(lanes);
    return lanes[0];
}

struct Rounding {
    float step, point, lowest, highest;  // rne(x / step) is kept within the last two; q adds `point`
};

template <class V>
Rounding rounding_of(const dither::Int8Matmul& p, float lo, float hi) {
    const float peak = -lo > hi ? -lo : hi;
    if (p.grid == dither::TokenGrid::symmetric) return {stored_one<V>(peak / p.divisor, p.step_type), 0, p.lowest, p.highest};
    if (p.grid == dither::TokenGrid::extremum) {
        const float step = stored_one<V>(peak / p.divisor, p.step_type);
        return {hi >= -lo && peak > 0 ? -step : step, 0, p.lowest, p.highest};
    }
    const float step = stored_one<V>((hi - lo) / p.divisor, p.step_type);
    float lanes[V::lanes];
    whole(V::set1(-lo / step), V::set1(0), V::set1(p.divisor)).store(lanes);
    return {step, lanes[0] - static_cast<float>(p.input_middle), -lanes[0], p.divisor - lanes[0]};
}

template <class V, class X>
bool round_token(const dither::Int8Matmul& p, const X* x, int64_t t) {
    constexpr int64_t L = V::lanes;
    V low = V::set1(0), high = low, check = low;
    for (int64_t i = 0; i < p.columns; i += L) {
        const V v = i + L <= p.columns ? load(x + i) : load_first(x + i, p.columns - i, 0.0f);
        low = V::min(low, v);
        high = V::max(high, v);
        check = V::fmadd(v, V::set1(0), check);
    }
    int8_t* const q = p.q + t * p.q_stride;
    int32_t* const sums = p.sums + t * p.groups;
    p.points[t] = 0;
    if (!all_zero(check)) {
        p.steps[t] = __builtin_nanf("");
        std::memset(q, 0, p.q_stride);
        std::memset(sums, 0, sizeof(int32_t) * p.groups);
        return false;
    }
    const Rounding r = rounding_of<V>(p, low.least(), high.greatest());
    p.steps[t] = r.step;
    if (p.pointed()) p.points[t] = static_cast<int32_t>(r.point);
    const V step = V::set1(r.step), lowest = V::set1(r.lowest), highest = V::set1(r.highest), point = V::set1(r.point);
    for (int64_t g = 0; g < p.groups; ++g) {
        const int64_t first = g * p.group, last = first + p.group < p.columns ? first + p.group : p.columns;
        int8_t* to = q + g * p.padded;
        V sum = V::set1(0);
        for (int64_t i = first; i < last; i += L, to += L) {
            const V v = i + L <= last ? load(x + i) : load_first(x + i, last - i, 0.0f);
            const V whole_v = whole(v / step, lowest, highest) + point;
            store_signed(whole_v, to);
            sum = sum + whole_v;
        }
        const int64_t beyond = (L - (last - first) % L) % L;  // lanes that held no x, and became the point
        sums[g] = static_cast<int32_t>(total(sum) - static_cast<float>(beyond) * r.point);
        int8_t* const own_end = q + g * p.padded + (last - first);
        std::memset(own_end, 0, q + (g + 1 < p.groups ? (g + 1) * p.padded : p.q_stride) - own_end);
    }
    return true;
}

template <class V>
bool round_token(const dither::Int8Matmul& p, int64_t t) {
    if (p.bfloat16) return round_token<V>(p, static_cast<const dither::BFloat16*>(p.x) + t * p.x_next, t);
    return round_token<V>(p, static_cast<const float*>(p.x) + t * p.x_next, t);
}

}  // namespace
