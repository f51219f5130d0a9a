// The instructions of tape.hpp, written once for every vector type. Include storage_*.hpp and ext_exp_*.hpp first.
#pragma once

#include "tape.hpp"

namespace {

using dither::Element;
using dither::Elementwise;
using dither::Function;
using dither::Place;

constexpr int64_t L = F32::lanes;

inline F32 get(const void* p, Element type, int64_t i) {
    return type == Element::float32 ? load(static_cast<const float*>(p) + i) : load(static_cast<const BFloat16*>(p) + i);
}
inline F32 get_first(const void* p, Element type, int64_t i, int64_t n) {
    return type == Element::float32 ? load_first(static_cast<const float*>(p) + i, n, 0.0f) : load_first(static_cast<const BFloat16*>(p) + i, n, 0.0f);
}
inline void put(void* p, Element type, int64_t i, F32 x) {
    if (type == Element::float32) store(static_cast<float*>(p) + i, x);
    else store(static_cast<BFloat16*>(p) + i, x);
}
inline void put_first(void* p, Element type, int64_t i, F32 x, int64_t n) {
    if (type == Element::float32) store_first(static_cast<float*>(p) + i, x, n);
    else store_first(static_cast<BFloat16*>(p) + i, x, n);
}
inline float one(const void* p, Element type, int64_t i) {
    float lanes[L];
    get_first(p, type, i, 1).store(lanes);
    return lanes[0];
}

// 1 / (1 + e^-x) by e^-|x|, which overflows nowhere
inline F32 sigmoid(F32 x) {
    const F32 zero = F32::set1(0), e = exp_negative(F32::min(x, zero - x)), below = F32::set1(1) + e;
    return F32::select_lt(x, zero, e, F32::set1(1)) / below;
}

template <class F>
F32 each_lane(F32 x, F f) {
    float lanes[L];
    x.store(lanes);
    for (float& lane : lanes) lane = f(lane);
    return F32::load(lanes);
}

__attribute__((always_inline)) inline F32 apply(Function function, F32 a, F32 b) {
    switch (function) {
        case Function::copy: return a;
        case Function::add: return a + b;
        case Function::sub: return a - b;
        case Function::mul: return a * b;
        case Function::div: return a / b;
        case Function::neg: return F32::set1(0) - a;
        case Function::silu: return a * sigmoid(a);
        case Function::sigmoid: return sigmoid(a);
        case Function::relu: return F32::max(a, F32::set1(0));
        case Function::gelu: return each_lane(a, [](float x) { return 0.5f * x * (1.0f + __builtin_erff(x * 0.70710678f)); });
        case Function::gelu_tanh:
            return each_lane(a, [](float x) { return 0.5f * x * (1.0f + __builtin_tanhf(0.79788456f * (x + 0.044715f * x * x * x))); });
        case Function::exp: return each_lane(a, [](float x) { return __builtin_expf(x); });
        case Function::tanh: return each_lane(a, [](float x) { return __builtin_tanhf(x); });
        case Function::sin: return each_lane(a, [](float x) { return __builtin_sinf(x); });
        case Function::cos: return each_lane(a, [](float x) { return __builtin_cosf(x); });
        case Function::sqrt: return each_lane(a, [](float x) { return __builtin_sqrtf(x); });
        case Function::rsqrt: return each_lane(a, [](float x) { return 1.0f / __builtin_sqrtf(x); });
        case Function::reciprocal: return F32::set1(1) / a;
        case Function::pow: {
            float power[L];
            b.store(power);
            return power[0] == 2 ? a * a : each_lane(a, [&](float x) { return __builtin_powf(x, power[0]); });
        }
        default: return a;
    }
}

inline float sum_of(F32 x) {
    float lanes[L];
    x.store(lanes);
    float sum = 0;
    for (int l = 0; l < L; ++l) sum += lanes[l];
    return sum;
}

template <class T>
float summed(const T* a, int64_t count) {
    F32 sum[4] = {F32::set1(0), F32::set1(0), F32::set1(0), F32::set1(0)};
    int64_t i = 0;
    for (; i + 4 * L <= count; i += 4 * L)
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) sum[j] = sum[j] + load(a + i + j * L);
    for (; i < count; i += L) {
        const int64_t left = count - i;
        sum[0] = sum[0] + (left >= L ? load(a + i) : load_first(a + i, left, 0.0f));
    }
    return sum_of((sum[0] + sum[1]) + (sum[2] + sum[3]));
}

inline float summed(const Place& a, int64_t from, int64_t count) {
    if (a.stride[3] == 1)
        return a.type == Element::float32 ? summed(static_cast<const float*>(a.at) + from, count) : summed(static_cast<const BFloat16*>(a.at) + from, count);
    float total = 0;
    for (int64_t i = 0; i < count; ++i) total += one(a.at, a.type, from + i * a.stride[3]);
    return total;
}

// one run along the last axis, from these elements on
inline void run_of(const Elementwise& e, int64_t y, int64_t a, int64_t b) {
    const int64_t count = e.size[3];
    const auto operand = [](const Place& p, int64_t from, int64_t i, int64_t n) {
        if (p.stride[3] == 1) return n >= L ? get(p.at, p.type, from + i) : get_first(p.at, p.type, from + i, n);
        if (p.stride[3] == 0) return F32::set1(one(p.at, p.type, from));
        float lanes[L] = {};
        for (int64_t l = 0; l < L && l < n; ++l) lanes[l] = one(p.at, p.type, from + (i + l) * p.stride[3]);
        return F32::load(lanes);
    };
    const F32 value = F32::set1(e.value);
    for (int64_t i = 0; i < count; i += L) {
        const int64_t left = count - i;
        const F32 x = apply(e.function, operand(e.a, a, i, left), e.constant ? value : operand(e.b, b, i, left));
        if (e.y.stride[3] == 1 || count == 1) {
            if (left >= L) put(e.y.at, e.y.type, y + i, x);
            else put_first(e.y.at, e.y.type, y + i, x, left);
        } else {
            float lanes[L];
            x.store(lanes);
            for (int64_t l = 0; l < L && l < left; ++l) put_first(e.y.at, e.y.type, y + (i + l) * e.y.stride[3], F32::set1(lanes[l]), 1);
        }
    }
}

// The functions that models are mostly made of, on elements that lie side by side: B is the type of b, or Repeated for one number.
struct Repeated {};

template <Function function, class Y, class A, class B>
void flat(const Elementwise& e, int64_t y, int64_t a, int64_t b) {
    Y* const to = static_cast<Y*>(e.y.at) + y;
    const A* const left = static_cast<const A*>(e.a.at) + a;
    const int64_t count = e.size[3];
    const auto loop = [&](auto right, auto right_first) __attribute__((always_inline)) {
        int64_t i = 0;
        for (; i + L <= count; i += L) store(to + i, apply(function, load(left + i), right(i)));
        if (const int64_t n = count - i; n > 0) store_first(to + i, apply(function, load_first(left + i, n, 0.0f), right_first(i, n)), n);
    };
    if constexpr (__is_same(B, Repeated)) {
        const F32 value = F32::set1(e.constant ? e.value : one(e.b.at, e.b.type, b));
        loop([=](int64_t) { return value; }, [=](int64_t, int64_t) { return value; });
    } else {
        const B* const from = static_cast<const B*>(e.b.at) + b;
        loop([=](int64_t i) { return load(from + i); }, [=](int64_t i, int64_t n) { return load_first(from + i, n, 0.0f); });
    }
}

using RunOf = void (*)(const Elementwise&, int64_t y, int64_t a, int64_t b);

template <Function function, class B>
RunOf flat_of_types(const Elementwise& e) {
    const bool narrow_a = e.a.type == Element::bfloat16;
    if (e.y.type == Element::bfloat16) return narrow_a ? flat<function, BFloat16, BFloat16, B> : flat<function, BFloat16, float, B>;
    return narrow_a ? flat<function, float, BFloat16, B> : flat<function, float, float, B>;
}

template <Function function>
RunOf flat_of_two(const Elementwise& e) {
    if (e.constant || e.b.stride[3] == 0) return flat_of_types<function, Repeated>(e);
    return e.b.type == Element::bfloat16 ? flat_of_types<function, BFloat16>(e) : flat_of_types<function, float>(e);
}

inline RunOf run_for(const Elementwise& e) {
    if (e.y.stride[3] != 1 || e.a.stride[3] != 1 || (!e.constant && e.b.stride[3] != 0 && e.b.stride[3] != 1)) return run_of;
    switch (e.function) {
        case Function::copy: return flat_of_types<Function::copy, Repeated>(e);
        case Function::neg: return flat_of_types<Function::neg, Repeated>(e);
        case Function::silu: return flat_of_types<Function::silu, Repeated>(e);
        case Function::add: return flat_of_two<Function::add>(e);
        case Function::sub: return flat_of_two<Function::sub>(e);
        case Function::mul: return flat_of_two<Function::mul>(e);
        default: return run_of;
    }
}

inline void reduce(const Elementwise& e, int64_t y, int64_t a, int64_t) {
    const float total = summed(e.a, a, e.size[3]);
    put_first(e.y.at, e.y.type, y, F32::set1(e.function == Function::mean ? total / static_cast<float>(e.size[3]) : total), 1);
}

inline void elementwise(const Elementwise& e) {
    if (e.function == Function::pow && e.value == 2) {
        Elementwise square = e;
        square.function = Function::mul, square.constant = false, square.b = e.a;
        return elementwise(square);
    }
    const RunOf run = e.function == Function::sum || e.function == Function::mean ? reduce : run_for(e);
    const auto at = [](const Place& p, int64_t i, int64_t j, int64_t k) { return i * p.stride[0] + j * p.stride[1] + k * p.stride[2]; };
    for (int64_t i = 0; i < e.size[0]; ++i)
        for (int64_t j = 0; j < e.size[1]; ++j)
            for (int64_t k = 0; k < e.size[2]; ++k) run(e, at(e.y, i, j, k), at(e.a, i, j, k), at(e.b, i, j, k));
}

inline void widen(const void* from, Element type, int64_t count, float* to) {
    for (int64_t i = 0; i < count; i += L) {
        if (count - i >= L) get(from, type, i).store(to + i);
        else store_first(to + i, get_first(from, type, i, count - i), count - i);
    }
}

inline void narrow(const float* from, Element type, int64_t count, void* to) {
    for (int64_t i = 0; i < count; i += L) {
        if (count - i >= L) put(to, type, i, F32::load(from + i));
        else put_first(to, type, i, load_first(from + i, count - i, 0.0f), count - i);
    }
}

// R rows of a dense matrix on N tokens, x [N, columns]; y is that of the first row and token
template <class T, int R, int N>
void dense_rows(const T* weight, int64_t columns, const float* x, float* y, int64_t y_next) {
    F32 sum[R][N][2];
    for (int r = 0; r < R; ++r)
        for (int n = 0; n < N; ++n) sum[r][n][0] = sum[r][n][1] = F32::set1(0);
    int64_t i = 0;
    for (; i + 2 * L <= columns; i += 2 * L)
#pragma GCC unroll 2
        for (int h = 0; h < 2; ++h) {
            F32 in[N];
#pragma GCC unroll 4
            for (int n = 0; n < N; ++n) in[n] = F32::load(x + n * columns + i + h * L);
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) {
                const F32 w = load(weight + r * columns + i + h * L);
#pragma GCC unroll 4
                for (int n = 0; n < N; ++n) sum[r][n][h] = F32::fmadd(w, in[n], sum[r][n][h]);
            }
        }
    for (; i < columns; i += L) {
        const int64_t left = columns - i < L ? columns - i : L;
        for (int n = 0; n < N; ++n) {
            const F32 in = load_first(x + n * columns + i, left, 0.0f);
            for (int r = 0; r < R; ++r) {
                const T* const w = weight + r * columns + i;
                sum[r][n][0] = F32::fmadd(left == L ? load(w) : load_first(w, left, 0.0f), in, sum[r][n][0]);
            }
        }
    }
    for (int n = 0; n < N; ++n)
        for (int r = 0; r < R; ++r) y[n * y_next + r] = sum_of(sum[r][n][0] + sum[r][n][1]);
}

// N tokens, as many rows of the matrix as registers hold sums for
template <class T, int N>
void dense_tokens(const dither::Dense& d, const float* x, int64_t first, int64_t last, float* y) {
    constexpr int R = N == 4 ? 2 : 4;
    const T* const weight = static_cast<const T*>(d.weight);
    int64_t o = first;
    for (; o + R <= last; o += R) dense_rows<T, R, N>(weight + o * d.columns, d.columns, x, y + o, d.rows);
    for (; o < last; ++o) dense_rows<T, 1, N>(weight + o * d.columns, d.columns, x, y + o, d.rows);
}

template <class T>
void dense_of(const dither::Dense& d, const float* x, int64_t tokens, int64_t first, int64_t last, float* y) {
    for (; tokens >= 4; tokens -= 4, x += 4 * d.columns, y += 4 * d.rows) dense_tokens<T, 4>(d, x, first, last, y);
    for (; tokens >= 2; tokens -= 2, x += 2 * d.columns, y += 2 * d.rows) dense_tokens<T, 2>(d, x, first, last, y);
    if (tokens) dense_tokens<T, 1>(d, x, first, last, y);
}

inline void dense(const dither::Dense& d, const float* x, int64_t tokens, int64_t first, int64_t last, float* y) {
    if (d.type == Element::float32) dense_of<float>(d, x, tokens, first, last, y);
    else dense_of<BFloat16>(d, x, tokens, first, last, y);
}

constexpr int64_t most_width = 512;  // of a head; checked in Python

inline void read_head(const dither::Head& from, Element type, int64_t head, int64_t width, float* to) {
    if (from.feature == 1) {
        for (int64_t i = 0; i < width; i += L) {
            const int64_t left = width - i;
            (left >= L ? get(from.at, type, head * from.head + i) : get_first(from.at, type, head * from.head + i, left)).store(to + i);
        }
    } else {
        for (int64_t i = 0; i < width; ++i) to[i] = one(from.at, type, head * from.head + i * from.feature);
    }
}

// The logits of H heads that share keys, a panel of keys at a time: lanes are keys, so nothing is summed across lanes.
template <class T, int H>
void logits_of(const T* keys, const float (*q)[most_width + L], int64_t width, int64_t length, float scale, float* logits, int64_t stride) {
    constexpr int64_t panel = dither::key_panel;
    constexpr int parts = panel / L;
    for (int64_t t = 0; t < length; t += panel, keys += panel * width) {
        F32 sum[H][parts][2];
        for (int h = 0; h < H; ++h)
            for (int part = 0; part < parts; ++part) sum[h][part][0] = sum[h][part][1] = F32::set1(0);
        int64_t i = 0;
        for (; i + 2 <= width; i += 2)
#pragma GCC unroll 2
            for (int odd = 0; odd < 2; ++odd)
#pragma GCC unroll 4
                for (int part = 0; part < parts; ++part) {
                    const F32 k = load(keys + (i + odd) * panel + part * L);
#pragma GCC unroll 4
                    for (int h = 0; h < H; ++h) sum[h][part][odd] = F32::fmadd(F32::set1(q[h][i + odd]), k, sum[h][part][odd]);
                }
        if (i < width)
            for (int part = 0; part < parts; ++part) {
                const F32 k = load(keys + i * panel + part * L);
                for (int h = 0; h < H; ++h) sum[h][part][0] = F32::fmadd(F32::set1(q[h][i]), k, sum[h][part][0]);
            }
        for (int h = 0; h < H; ++h)
            for (int part = 0; part < parts; ++part)
                ((sum[h][part][0] + sum[h][part][1]) * F32::set1(scale)).store(logits + h * stride + t + part * L);
    }
}

// e^(logit - greatest), and one over their sum; what lies behind the last is left alone
inline float exponentials(float* logits, int64_t length) {
    const float lowest = -__builtin_inff();
    const auto some = [&](int64_t t) { return length - t >= L ? F32::load(logits + t) : load_first(logits + t, length - t, lowest); };
    F32 top = F32::set1(lowest), total = F32::set1(0);
    for (int64_t t = 0; t < length; t += L) top = F32::max(some(t), top);
    const F32 greatest = F32::set1(top.greatest());
    for (int64_t t = 0; t < length; t += L) {
        const F32 e = exp_negative(some(t) - greatest);
        if (length - t >= L) e.store(logits + t);
        else store_first(logits + t, e, length - t);
        total = total + e;
    }
    return 1.0f / sum_of(total);
}

template <class T, int H>
void attend_heads(const dither::Attend& p, int64_t head, const T* keys, const T* values, int64_t length, float* logits, int64_t stride) {
    float q[H][most_width + L], out[H][most_width + L], inverse[H];
    for (int h = 0; h < H; ++h) read_head(p.q, p.type, head + h, p.width, q[h]);
    logits_of<T, H>(keys, q, p.width, length, p.scale, logits, stride);
    for (int h = 0; h < H; ++h) inverse[h] = exponentials(logits + h * stride, length);
    for (int64_t i = 0; i < p.value_width; i += L) {
        const int64_t left = p.value_width - i;
        F32 sum[H][4];
        for (int h = 0; h < H; ++h)
            for (int c = 0; c < 4; ++c) sum[h][c] = F32::set1(0);
        const auto add = [&](int64_t t, int c) {
            const T* const from = values + t * p.value_width + i;
            const F32 v = left >= L ? load(from) : load_first(from, left, 0.0f);
#pragma GCC unroll 4
            for (int h = 0; h < H; ++h) sum[h][c] = F32::fmadd(F32::set1(logits[h * stride + t]), v, sum[h][c]);
        };
        int64_t t = 0;
        for (; t + 4 <= length; t += 4)
#pragma GCC unroll 4
            for (int c = 0; c < 4; ++c) add(t + c, c);
        for (; t < length; ++t) add(t, 0);
        for (int h = 0; h < H; ++h) (((sum[h][0] + sum[h][1]) + (sum[h][2] + sum[h][3])) * F32::set1(inverse[h])).store(out[h] + i);
    }
    for (int h = 0; h < H; ++h) narrow(out[h], p.type, p.value_width, static_cast<T*>(p.y) + (head + h) * p.y_head);
}

template <class T>
void attend_of(const dither::Attend& p, int64_t head, int64_t count, const T* keys, const T* values, int64_t length, float* logits, int64_t stride) {
    switch (count) {
        case 1: return attend_heads<T, 1>(p, head, keys, values, length, logits, stride);
        case 2: return attend_heads<T, 2>(p, head, keys, values, length, logits, stride);
        case 3: return attend_heads<T, 3>(p, head, keys, values, length, logits, stride);
        default: return attend_heads<T, 4>(p, head, keys, values, length, logits, stride);
    }
}

inline void attend(const dither::Attend& p, int64_t head, int64_t count, const void* keys, const void* values, int64_t length, float* logits,
                   int64_t stride) {
    if (p.type == Element::float32) attend_of(p, head, count, static_cast<const float*>(keys), static_cast<const float*>(values), length, logits, stride);
    else attend_of(p, head, count, static_cast<const BFloat16*>(keys), static_cast<const BFloat16*>(values), length, logits, stride);
}

inline dither::TapeKernel tape_kernel() { return {elementwise, dense, widen, narrow, attend}; }

}  // namespace
