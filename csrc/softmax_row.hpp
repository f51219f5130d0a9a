// The passes of softmax.hpp, written once for every vector type and storage type.
#pragma once

#include "softmax.hpp"

namespace {

using dither::Number;
using dither::Peak;
using dither::Power;
using dither::SoftmaxPasses;

// Inputs are raised to this. Where the sum is near it, the row is done by its maximum instead (softmax.cpp), else what was raised gives exactly 0.
constexpr double lowest = -1e6;
constexpr int unroll = 4;  // vectors of a writing pass that are under way at once

constexpr double infinity = __builtin_inf();
constexpr double most(float) { return 0x1.fffffep127; }
constexpr double most(double) { return 0x1.fffffffffffffp1023; }

template <class V>
double sum_lanes(V x) {
    typename V::Real lanes[V::lanes];
    x.store(lanes);
    double sum = 0;
    for (int i = 0; i < V::lanes; ++i) sum += lanes[i];
    return sum;
}

template <class V>
double greatest_lane(V x) {
    typename V::Real lanes[V::lanes];
    x.store(lanes);
    double top = lanes[0];
    for (int i = 1; i < V::lanes; ++i) top = lanes[i] > top ? lanes[i] : top;
    return top;
}

template <class V, int count>
[[gnu::always_inline]] inline V sum_tree(const V* x) {
    if constexpr (count == 1) return x[0];
    else return sum_tree<V, count / 2>(x) + sum_tree<V, count - count / 2>(x + count / 2);
}

template <class V, int count>
[[gnu::always_inline]] inline V greatest_tree(const V* x) {
    if constexpr (count == 1) return x[0];
    else return V::max(greatest_tree<V, count / 2>(x), greatest_tree<V, count - count / 2>(x + count / 2));
}

// Calls add(vectors) with `size` vectors of x at a time, then with one at a time, the last filled up with `fill`
template <int size, class T, class Real, class Add>
[[gnu::always_inline]] inline void each_block(const T* x, int64_t count, Real fill, const Add& add) {
    using V = decltype(load(x));
    int64_t i = 0;
    for (; i + size * V::lanes <= count; i += size * V::lanes) {
        V v[size];
#pragma GCC unroll 16
        for (int j = 0; j < size; ++j) v[j] = load(x + i + j * V::lanes);
        add.template operator()<size>(v, i);
    }
    for (; i < count; i += V::lanes) {
        V v[1] = {i + V::lanes <= count ? load(x + i) : load_first(x + i, count - i, fill)};
        add.template operator()<1>(v, i);
    }
}

// y = f(x), or f(x, z) of two rows
template <class T, class... From, class F>
[[gnu::always_inline]] inline void map(T* y, int64_t count, bool past_caches, const F& f, const From*... x) {
    using V = decltype(load(y));
    constexpr int64_t L = V::lanes;
    constexpr typename V::Real zero = 0;
    int64_t i = 0;
    if (past_caches) {
        constexpr uint64_t bytes = L * sizeof(T);
        int64_t head = static_cast<int64_t>((bytes - reinterpret_cast<uint64_t>(y) % bytes) % bytes / sizeof(T));
        head = head < count ? head : count;
        if (head) store_first(y, f(load_first(x, head, zero)...), head);
        for (i = head; i + L <= count; i += L) stream(y + i, f(load(x + i)...));
        streamed();
    }
    for (; i + unroll * L <= count; i += unroll * L) {
        V v[unroll];
#pragma GCC unroll 16
        for (int j = 0; j < unroll; ++j) v[j] = f(load(x + i + j * L)...);
#pragma GCC unroll 16
        for (int j = 0; j < unroll; ++j) store(y + i + j * L, v[j]);
    }
    for (; i + L <= count; i += L) store(y + i, f(load(x + i)...));
    if (i < count) store_first(y + i, f(load_first(x + i, count - i, zero)...), count - i);
}

template <class T>
struct Passes {
    using V = decltype(load(static_cast<const T*>(nullptr)));
    using Real = typename V::Real;

    static V set(double x) { return V::set1(static_cast<Real>(x)); }
    static const T* in(const void* x, int64_t begin) { return static_cast<const T*>(x) + begin; }
    static T* out(void* y, int64_t begin) { return static_cast<T*>(y) + begin; }
    static Real nothing() { return static_cast<Real>(-infinity); }
    static Extended<V> raised_exp(V x) { return extended_exp(V::max(set(lowest), x)); }  // NaN is what max gives second

    static Power extended_sum(const void* x, int64_t begin, int64_t count) {
        V sum = set(0), exponent = set(-1e30);
        each_block<block>(in(x, begin), count, nothing(), [&]<int size>(const V* v, int64_t) __attribute__((always_inline)) {
            V m[size], n[size];
#pragma GCC unroll 16
            for (int j = 0; j < size; ++j) {
                const Extended<V> e = raised_exp(v[j]);
                m[j] = e.m;
                n[j] = e.n;
            }
            const V top = V::max(exponent, greatest_tree<V, size>(n));
#pragma GCC unroll 16
            for (int j = 0; j < size; ++j) m[j] = scaled(m[j], n[j] - top);
            sum = scaled(sum, exponent - top) + sum_tree<V, size>(m);
            exponent = top;
        });
        const double top = greatest_lane(exponent);
        return {sum_lanes(scaled(sum, exponent - set(top))), top};
    }

    static double greatest(const void* x, int64_t begin, int64_t count) {
        V top = set(-infinity);
        each_block<block>(in(x, begin), count, nothing(), [&]<int size>(const V* v, int64_t) __attribute__((always_inline)) {
            // not a tree of the vectors alone: NaN is what max gives second, and what is second here never is
            V tops[size];
#pragma GCC unroll 16
            for (int j = 0; j < size; ++j) tops[j] = V::max(v[j], top);
            top = greatest_tree<V, size>(tops);
        });
        return greatest_lane(top);
    }

    static double sum(const void* x, int64_t begin, int64_t count, double greatest) {
        V total = set(0);
        const V top = set(greatest);
        each_block<block>(in(x, begin), count, nothing(), [&]<int size>(const V* v, int64_t) __attribute__((always_inline)) {
            V e[size];
#pragma GCC unroll 16
            for (int j = 0; j < size; ++j) e[j] = exp_negative(v[j] - top);
            total = total + sum_tree<V, size>(e);
        });
        return sum_lanes(total);
    }

    static double sum_kept(const void* x, int64_t begin, int64_t count, double greatest, void* kept) {
        V total = set(0);
        const V top = set(greatest);
        Real* const to = static_cast<Real*>(kept) + begin;
        each_block<block>(in(x, begin), count, nothing(), [&]<int size>(const V* v, int64_t i) __attribute__((always_inline)) {
            V e[size];
#pragma GCC unroll 16
            for (int j = 0; j < size; ++j) e[j] = exp_negative(v[j] - top);
            if (size > 1 || i + V::lanes <= count) {
#pragma GCC unroll 16
                for (int j = 0; j < size; ++j) store(to + i + j * V::lanes, e[j]);
            } else {
                store_first(to + i, e[0], count - i);
            }
            total = total + sum_tree<V, size>(e);
        });
        return sum_lanes(total);
    }

    // Starts at the most negative number, not at -inf, which minus itself is NaN; a row of nothing but -inf then sums to 0.
    static Peak online_sum(const void* x, int64_t begin, int64_t count) {
        V total = set(0), top = set(-most(Real()));
        each_block<block>(in(x, begin), count, nothing(), [&]<int size>(const V* v, int64_t) __attribute__((always_inline)) {
            V e[size];
#pragma GCC unroll 16
            for (int j = 0; j < size; ++j) e[j] = V::max(v[j], top);
            const V higher = greatest_tree<V, size>(e);
#pragma GCC unroll 16
            for (int j = 0; j < size; ++j) e[j] = exp_negative(v[j] - higher);
            total = total * exp_negative(top - higher) + sum_tree<V, size>(e);
            top = higher;
        });
        const double highest = greatest_lane(top);
        return {sum_lanes(total * exp_negative(top - set(highest))), highest};
    }

    static void divide_extended(const void* x, int64_t begin, int64_t count, Power inverse, void* y, bool past_caches) {
        const V mantissa = set(inverse.mantissa), exponent = set(inverse.exponent);
        map(out(y, begin), count, past_caches, [&](V v) __attribute__((always_inline)) {
            const Extended<V> e = raised_exp(v);
            return scaled(e.m * mantissa, e.n + exponent);
        }, in(x, begin));
    }

    static void divide(const void* x, int64_t begin, int64_t count, double greatest, double inverse, void* y, bool past_caches) {
        const V top = set(greatest), factor = set(inverse);
        map(out(y, begin), count, past_caches, [&](V v) __attribute__((always_inline)) { return exp_negative(v - top) * factor; }, in(x, begin));
    }

    static void divide_kept(const void* kept, int64_t begin, int64_t count, double inverse, void* y) {
        const V factor = set(inverse);
        const Real* const from = static_cast<const Real*>(kept) + begin;
        map(out(y, begin), count, false, [&](V v) __attribute__((always_inline)) { return v * factor; }, from);
    }

    static void subtract(const void* x, int64_t begin, int64_t count, double high, double low, void* y, bool past_caches) {
        const V first = set(high), second = set(low), zero = set(0);  // no logarithm of a probability is above 0; NaN is what min gives second
        map(out(y, begin), count, past_caches, [&](V v) __attribute__((always_inline)) { return V::min(zero, (v - first) - second); }, in(x, begin));
    }

    static bool any_nan(const void* x, int64_t begin, int64_t count) {
        V sum = set(0);  // of numbers between -1 and 0, or NaN
        each_block<1>(in(x, begin), count, Real(0), [&]<int size>(const V* v, int64_t) __attribute__((always_inline)) {
            sum = sum + V::max(set(-1), V::min(set(0), v[0]));
        });
        const double total = sum_lanes(sum);
        return total != total;
    }

    static double dot(const void* y, const void* g, int64_t begin, int64_t count) {
        const T* const from = in(g, begin);
        V sum = set(0);
        each_block<block>(in(y, begin), count, Real(0), [&]<int size>(const V* v, int64_t i) __attribute__((always_inline)) {
            V product[size];
#pragma GCC unroll 16
            for (int j = 0; j < size; ++j) {
                const int64_t at = i + j * V::lanes;
                product[j] = v[j] * (at + V::lanes <= count ? load(from + at) : load_first(from + at, count - at, Real(0)));
            }
            sum = sum + sum_tree<V, size>(product);
        });
        return sum_lanes(sum);
    }

    static void gradient(const void* y, const void* g, int64_t begin, int64_t count, double dot, void* dx) {
        const V mean = set(dot);
        map(out(dx, begin), count, false, [&](V a, V b) __attribute__((always_inline)) { return a * (b - mean); }, in(y, begin), in(g, begin));
    }

    static constexpr SoftmaxPasses table = {V::lanes * 256, &extended_sum, &greatest, &sum,     &sum_kept, &online_sum, &divide_extended,
                                            &divide,        &divide_kept,  &subtract, &any_nan, &dot,      &gradient};
};

inline const SoftmaxPasses& softmax_passes(Number type) {
    switch (type) {
        case Number::float64: return Passes<double>::table;
        case Number::bfloat16: return Passes<BFloat16>::table;
        case Number::float16: return Passes<Float16>::table;
        default: return Passes<float>::table;
    }
}

}  // namespace
