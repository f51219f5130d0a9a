// Extended numbers: e^x = m 2^n with m in [sqrt(1/2), sqrt(2)] and n an integer kept as a floating point number, so that nothing overflows.
//     n = round(x log2(e)),  t = x - n ln 2,  m = p(t)
// Dukhan and Ablavatski, The Two-Pass Softmax Algorithm, 2020, arXiv 2001.04438; the float32 constants are those of their code in XNNPACK.
// Written once for every vector type; include ext_exp_avx512.hpp, ext_exp_avx2.hpp or ext_exp_scalar.hpp first.
#pragma once

namespace {

template <class Real>
struct Exp;

// |m / exact - 1| < 1.7e-7
template <>
struct Exp<float> {
    static constexpr float log2e = 0x1.715476p+0f;
    // p(t) = 1 + c1 t + ... + c5 t^5
    static constexpr float p[] = {1.0f, 0x1.FFFFF6p-1f, 0x1.FFFDC6p-2f, 0x1.555A80p-3f, 0x1.573A1Ap-5f, 0x1.0F9F9Cp-7f};
};

// |p / exact - 1| < 1e-17 before rounding: p interpolates (e^t - 1) / t in Chebyshev's points of |t| <= ln 2 / 2
template <>
struct Exp<double> {
    static constexpr double log2e = 0x1.71547652b82fep+0;
    static constexpr double p[] = {1.0,
                                   1.0,
                                   0x1.0000000000005p-1,
                                   0x1.5555555555557p-3,
                                   0x1.55555555520afp-5,
                                   0x1.11111111100dfp-7,
                                   0x1.6c16c17f43a64p-10,
                                   0x1.a01a01abe62e4p-13,
                                   0x1.a019a66a7378bp-16,
                                   0x1.71de023754ddep-19,
                                   0x1.28a2c0a99e1f7p-22,
                                   0x1.af4ddd87988f4p-26};
};

// x - n ln 2 for n below 2^22, whose product with the first piece is exact with and without fused products
inline F64 reduced(F64 x, F64 n) { return F64::fnmadd(n, F64::set1(0x1.d1cf79abc9e3bp-32), F64::fnmadd(n, F64::set1(0x1.62e42fecp-1), x)); }

template <class V>
V exp_polynomial(V t) {
    using Real = typename V::Real;
    constexpr int degree = sizeof(Exp<Real>::p) / sizeof(Real) - 1;
    V p = V::set1(Exp<Real>::p[degree]);
#pragma GCC unroll 16
    for (int i = degree - 1; i >= 0; --i) p = V::fmadd(p, t, V::set1(Exp<Real>::p[i]));
    return p;
}

template <class V>
struct Extended {
    V m, n;
};

// of finite |x| < 2^20; NaN for NaN and +-inf
template <class V>
Extended<V> extended_exp(V x) {
    const V n = nearest(x * V::set1(Exp<typename V::Real>::log2e));
    return {exp_polynomial(reduced(x, n)), n};
}

// e^x for x <= 0, with 0 for -inf and NaN for NaN
template <class V>
V exp_negative(V x) {
    using Real = typename V::Real;
    const Extended<V> e = extended_exp(V::max(V::set1(static_cast<Real>(bottom(Real()))), x));  // NaN is what max gives second
    return scaled_bounded(e.m, e.n);
}

}  // namespace
