// Vectors of four lanes (or `count`) in plain C++: what every compiler can build, and often turns into the vectors of its own target.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

template <class T, int count = 4>
struct Scalar {
    using Real = T;
    static constexpr int lanes = count;
    static constexpr int panel = 6;  // columns whose accumulators stay in registers (gptq_tile.hpp)
    T v[lanes];

    template <class F>
    static Scalar each(F f) {
        Scalar r;
        for (int i = 0; i < lanes; ++i) r.v[i] = f(i);
        return r;
    }
    static Scalar load(const T* p) { return each([&](int i) { return p[i]; }); }
    static Scalar set1(T x) { return each([&](int) { return x; }); }
    void store(T* p) const { for (int i = 0; i < lanes; ++i) p[i] = v[i]; }
    void stream(T* p) const { store(p); }
    static void fence() {}

    friend Scalar operator+(Scalar a, Scalar b) { return each([&](int i) { return a.v[i] + b.v[i]; }); }
    friend Scalar operator-(Scalar a, Scalar b) { return each([&](int i) { return a.v[i] - b.v[i]; }); }
    friend Scalar operator*(Scalar a, Scalar b) { return each([&](int i) { return a.v[i] * b.v[i]; }); }
    friend Scalar operator/(Scalar a, Scalar b) { return each([&](int i) { return a.v[i] / b.v[i]; }); }
    // c - a b; two roundings here, one on targets with FMA
    static Scalar fnmadd(Scalar a, Scalar b, Scalar c) { return each([&](int i) { return c.v[i] - a.v[i] * b.v[i]; }); }
    static Scalar fmadd(Scalar a, Scalar b, Scalar c) { return each([&](int i) { return c.v[i] + a.v[i] * b.v[i]; }); }
    static Scalar round(Scalar a) { return each([&](int i) { return std::nearbyint(a.v[i]); }); }  // half to even
    static Scalar min(Scalar a, Scalar b) { return each([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; }); }
    static Scalar max(Scalar a, Scalar b) { return each([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; }); }
    T least() const { return fold([](T a, T b) { return a < b ? a : b; }); }
    T greatest() const { return fold([](T a, T b) { return a > b ? a : b; }); }
    template <class F>
    T fold(F f) const {
        T r = v[0];
        for (int i = 1; i < lanes; ++i) r = f(r, v[i]);
        return r;
    }
    static Scalar power_of_two(Scalar a) {  // the largest one up to a, for normal a > 0
        static_assert(sizeof(T) == 4);
        return each([&](int i) {
            uint32_t bits;
            std::memcpy(&bits, &a.v[i], 4);
            bits &= 0x7f800000;
            T power;
            std::memcpy(&power, &bits, 4);
            return power;
        });
    }
    template <int distance>
    static Scalar exchange(Scalar a) { return each([&](int i) { return a.v[i ^ distance]; }); }
    static Scalar select_lt(Scalar a, Scalar b, Scalar x, Scalar y) {  // x where a < b, else y
        return each([&](int i) { return a.v[i] < b.v[i] ? x.v[i] : y.v[i]; });
    }
    static Scalar clamp(Scalar a, Scalar lo, Scalar hi) {
        return each([&](int i) {
            const T t = a.v[i] > lo.v[i] ? a.v[i] : lo.v[i];  // NaN becomes lo, as with the x86 instructions
            return t < hi.v[i] ? t : hi.v[i];
        });
    }
    static Scalar add_where_ge(Scalar sum, Scalar a, Scalar edge) {  // sum + (a >= edge)
        return each([&](int i) { return sum.v[i] + (a.v[i] >= edge.v[i] ? T(1) : T(0)); });
    }
    void store_codes(uint8_t* p) const { for (int i = 0; i < lanes; ++i) p[i] = static_cast<uint8_t>(v[i]); }
};

using F32 = Scalar<float>;
using F64 = Scalar<double>;

}  // namespace
