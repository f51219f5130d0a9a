// The regions of bessel.hpp, written once for every vector type. Names and equations as in dither/kernels/bessel_reference.py.
#pragma once

#include "bessel.hpp"
#include "math_f64.hpp"

namespace {

using dither::BesselRegion;
using dither::BesselTables;

constexpr double pi = 3.14159265358979323846;

struct Pair {
    F64 value, ratio;
};

// 1/x^k sums of Hankel's expansion
template <int terms, bool second>
Pair hankel(const BesselTables& t, F64 v, F64 x) {
    const F64 one = F64::set1(1), y = one / x, mu = F64::set1(4) * v * v, signed_y = second ? y : F64::set1(0) - y;
    F64 c = one, s = F64::set1(0), d = F64::set1(0);
#pragma GCC unroll 20
    for (int k = 1; k <= terms; ++k) {
        c = c * (mu - F64::set1((2 * k - 1) * (2 * k - 1))) * (signed_y * F64::set1(1.0 / (8 * k)));
        s = s + c;
        d = F64::fmadd(F64::set1(k), c, d);
    }
    const F64 main = Log{t.logs}((one + s) * (one + s) * y * F64::set1(second ? 0.5 * pi : 0.5 / pi));
    const F64 value = F64::fmadd(F64::set1(0.5), main, second ? F64::set1(0) - x : x);
    const F64 bend = F64::fmadd(F64::set1(0.5), y, y * d / (one + s));
    return {value, one - (second ? v * y - bend : v * y + bend)};
}

// sum_k y^(k-1) sum_j table[k-1, j] tau^j
template <int terms>
F64 double_horner(const double* table, F64 tau, F64 y) {
    F64 total = F64::set1(0);
#pragma GCC unroll 20
    for (int k = terms; k > 0; --k) {
        const double* const row = table + (k - 1) * (dither::debye_terms + 1);
        F64 inner = F64::set1(row[k]);
#pragma GCC unroll 20
        for (int j = k - 1; j >= 0; --j) inner = F64::fmadd(inner, tau, F64::set1(row[j]));
        total = F64::fmadd(total, y, inner);
    }
    return total;
}

template <int terms, bool second, bool with_ratio>
Pair debye(const BesselTables& t, F64 v, F64 x) {
    const F64 zero = F64::set1(0), one = F64::set1(1), half = F64::set1(0.5), huge = F64::set1(0x1p500);
    const F64 scale = F64::select_lt(huge, v, F64::set1(0x1p-600), F64::select_lt(huge, x, F64::set1(0x1p-600), one));
    const F64 back = F64::select_lt(scale, one, F64::set1(0x1p600), one);
    const F64 shift = F64::select_lt(scale, one, F64::set1(600), zero);
    const F64 p = v * scale, q = x * scale;

    // w + w_low = sqrt(p^2 + q^2)
    F64 p_low, q_low, s_low, square_low;
    const F64 pp = product(p, p, p_low), qq = product(q, q, q_low);
    const F64 square = sum(pp, qq, s_low), w = root(square), again = product(w, w, square_low), inverse = one / w;
    const F64 w_low = (((square - again) - square_low) + (s_low + p_low + q_low)) * half * inverse;

    const F64 y = inverse * scale, signed_y = second ? zero - y : y, t_small = p * inverse, tau = t_small * t_small;
    const F64 s = double_horner<terms>(t.u, tau, signed_y) * signed_y;

    // asinh(v/x) = log((p + w) / q) = high + low
    F64 top_low, a, ka, b, kb, m_low, low;
    const F64 top = sum(p, w, top_low);
    split(top, a, ka);
    split(x, b, kb);
    const F64 quotient = a / b, once = product(quotient, b, m_low);
    const F64 rest = (((a - once) - m_low) + (top_low + w_low) * times_power(one, zero - ka)) / a;
    const F64 least = F64::set1(0.75), most = F64::set1(1.5);
    const F64 m = F64::select_lt(quotient, least, quotient + quotient, F64::select_lt(most, quotient, half * quotient, quotient));
    const F64 k = ka - kb + shift - F64::select_lt(quotient, least, one, F64::select_lt(most, quotient, zero - one, zero));
    const Log log{t.logs};
    const F64 high = log.log<true>(m, k, rest, low);

    F64 turned_low, main_low;
    const F64 turned = product(v, high, turned_low);
    const F64 main = sum(w * back, zero - turned, main_low);
    const F64 small = main_low + (w_low * back - turned_low - v * low);
    const F64 logarithm = log((one + s) * (one + s) * y * F64::set1(second ? 0.5 * pi : 0.5 / pi));
    const F64 value = second ? F64::fmadd(half, logarithm, zero - small) - main : main + F64::fmadd(half, logarithm, small);
    if constexpr (!with_ratio) return {value, value};
    const F64 r = double_horner<terms>(t.w, tau, signed_y) * signed_y / (one + s);
    return {value, x / (v + w * back) + q * inverse * r};
}

// the power series; 1 / Gamma(1 + v) = (1 + g) / ((f + 1) ... (f + n)) with v = n + f, |f| <= 1/2
template <int terms>
Pair small_i(const BesselTables& t, F64 v, F64 x) {
    const F64 one = F64::set1(1), half = F64::set1(0.5) * x, q = half * half;
    F64 n = one, p = one, m = F64::set1(0);
    for (int k = terms; k > 1; --k) {
        p = p * F64::fmadd(F64::set1(k), v, F64::set1(k * k));
        m = F64::fmadd(q, m, n);
        n = F64::fmadd(q, n, p);
    }
    p = p * (v + one);
    m = F64::fmadd(q, m, n);
    const F64 tail = q * n;
    n = p + tail;

    const F64 whole = F64::round(v), f = v - whole;
    F64 g = F64::set1(t.gamma[dither::gamma_terms - 1]);
    for (int k = dither::gamma_terms - 2; k > 0; --k) g = F64::fmadd(g, f, F64::set1(t.gamma[k]));
    g = g * f;
    F64 below = one;
    for (int j = 1; j < 14; ++j) below = F64::select_lt(whole, F64::set1(j), below, below * (f + F64::set1(j)));
    const F64 excess = tail / p;
    F64 error;  // of 1 + what log1p takes where v < 1/2 and the whole may be next to 1
    const F64 near = sum(one, g + excess + g * excess, error);
    const F64 argument = F64::select_lt(whole, one, near, (one + g) * n / (p * below));
    const Log log{t.logs};
    const F64 logarithm = log(argument, F64::select_lt(whole, one, error / near, F64::set1(0)));
    const F64 tiny = F64::set1(0x1p-1021), zero = F64::set1(0);  // below, x / 2 loses digits
    const F64 log_half = log(F64::select_lt(x, tiny, x, half)) - F64::select_lt(x, tiny, F64::set1(log.two_high() + log.two_low()), zero);
    return {F64::fmadd(v, log_half, logarithm), half * m / n};
}

// Temme's series for orders a and 1 - a, a <= 1/2, and the recurrence upwards; everything times powers of x/2
inline Pair temme(const BesselTables& t, F64 v, F64 x) {
    const F64 zero = F64::set1(0), one = F64::set1(1), two = F64::set1(2);
    const Log log{t.logs};
    const F64 log_half = log(x) - F64::set1(log.two_high() + log.two_low());
    const F64 half = F64::select_lt(x, F64::set1(0x1p-1021), F64::set1(0x1p-1022), F64::set1(0.5) * x);
    const F64 whole = floor(v), f = v - whole, a = F64::min(f, one - f), aa = a * a;
    const F64 exponent = two * a * log_half, power = log.exp(exponent);
    F64 even = F64::set1(t.gamma[dither::gamma_terms - 2]), odd = F64::set1(t.gamma[dither::gamma_terms - 1]);
    for (int k = dither::gamma_terms - 4; k >= 0; k -= 2) {
        even = F64::fmadd(even, aa, F64::set1(t.gamma[k]));
        odd = F64::fmadd(odd, aa, F64::set1(t.gamma[k + 1]));
    }
    const F64 upper = F64::fmadd(a, odd, even), lower = F64::fnmadd(a, odd, even);
    const F64 growth = F64::select_lt(F64::set1(1e-290), a, zero - log.exp_minus_1(exponent) / (two * a), zero - log_half);
    F64 term = (growth * even - F64::set1(0.5) * (one + power) * odd) / (upper * lower);
    F64 p = F64::set1(0.5) * power / lower, q = F64::set1(0.5) / upper;
    // everything times (1 - aa) ... (k k - aa), which is divided out at the end
    const F64 square = half * half;
    F64 c = one, first = term, other = p, divisor = one;
    for (int k = 1; k <= 12; ++k) {
        const F64 count = F64::set1(k), factor = F64::set1(k * k) - aa;
        term = F64::fmadd(count, term, p) + q;
        p = p * (count - a);
        q = q * (count + a);
        c = c * (square * F64::set1(1.0 / k));
        divisor = divisor * factor;
        first = F64::fmadd(first, factor, c * term);
        other = F64::fmadd(other, factor, c * F64::fnmadd(count, term, p));
    }
    first = first / divisor;
    other = other / divisor;
    const F64 middle = F64::set1(0.5);
    F64 g = F64::select_lt(middle, f, other / power, first);
    F64 below = F64::select_lt(middle, f, first * (half / power), other / half);
    for (int j = 0; j < 13; ++j) {
        const F64 step = F64::set1(j), next = F64::fmadd(half, below, (f + step) * g);
        below = F64::select_lt(step, whole, half * g, below);
        g = F64::select_lt(step, whole, next, g);
    }
    return {F64::fnmadd(v, log_half, log(g)), below / g};
}

// cosh(j s) for j = 0, 1, ...: cosh s - 1 comes without cancellation, so that small s keep their digits (Reinsch)
struct Cosines {
    F64 twice, step, value;

    Cosines(const Log& log, F64 s) : value(F64::set1(1)) {
        const F64 grown = log.exp_minus_1(s);  // cosh s - 1 = (e^s - 1)^2 / (2 e^s)
        twice = grown * grown / (F64::set1(1) + grown);
        step = F64::set1(-0.5) * twice;
    }
    void advance() {
        step = F64::fmadd(twice, value, step);
        value = value + step;
    }
};

template <int nodes, bool with_ratio>
Pair trapezoid(const BesselTables& t, F64 v, F64 x) {
    const Log log{t.logs};
    const F64 h = F64::set1(t.nodes[2]), one = F64::set1(1);
    Cosines same(log, v * h), below(log, (v - one) * h);
    F64 total = F64::set1(0.5), shifted = total;
    for (int j = 1; j < nodes; ++j) {
        const F64 falling = log.exp(F64::set1(0) - x * F64::set1(t.nodes[2 * j + 1]));
        same.advance();
        total = F64::fmadd(falling, same.value, total);
        if constexpr (with_ratio) {
            below.advance();
            shifted = F64::fmadd(falling, below.value, shifted);
        }
    }
    return {log(total * h) - x, shifted / total};
}

template <class F>
void each(F f, const double* v, const double* x, double* value, double* ratio, int64_t n) {
    for (int64_t i = 0; i < n; i += F64::lanes) {
        const Pair found = f(F64::load(v + i), F64::load(x + i));
        found.value.store(value + i);
        if (ratio) found.ratio.store(ratio + i);
    }
}

template <bool second, bool with_ratio>
void run_kind(BesselRegion region, const BesselTables& t, const double* v, const double* x, double* value, double* ratio, int64_t n) {
    const auto over = [&](auto f) { each([&](F64 a, F64 b) { return f(t, a, b); }, v, x, value, ratio, n); };
    switch (region) {
        case BesselRegion::mu_3: return over(hankel<3, second>);
        case BesselRegion::mu_20: return over(hankel<20, second>);
        case BesselRegion::u_4: return over(debye<4, second, with_ratio>);
        case BesselRegion::u_6: return over(debye<6, second, with_ratio>);
        case BesselRegion::u_7: return over(debye<7, second, with_ratio>);
        case BesselRegion::u_9: return over(debye<9, second, with_ratio>);
        case BesselRegion::u_13: return over(debye<13, second, with_ratio>);
        case BesselRegion::u_20: return over(debye<20, second, with_ratio>);
        default: break;
    }
    if constexpr (second) {
        switch (region) {
            case BesselRegion::small_1: return over(temme);
            case BesselRegion::small_3: return over(trapezoid<41, with_ratio>);
            case BesselRegion::small_8: return over(trapezoid<32, with_ratio>);
            default: return over(trapezoid<25, with_ratio>);
        }
    } else {
        switch (region) {
            case BesselRegion::small_1: return over(small_i<12>);
            case BesselRegion::small_3: return over(small_i<17>);
            case BesselRegion::small_8: return over(small_i<26>);
            default: return over(small_i<46>);
        }
    }
}

void run(BesselRegion region, bool second, const BesselTables& t, const double* v, const double* x, double* value, double* ratio, int64_t n) {
    if (second) {
        ratio ? run_kind<true, true>(region, t, v, x, value, ratio, n) : run_kind<true, false>(region, t, v, x, value, ratio, n);
    } else {
        ratio ? run_kind<false, true>(region, t, v, x, value, ratio, n) : run_kind<false, false>(region, t, v, x, value, ratio, n);
    }
}

inline F64 code(BesselRegion region) { return F64::set1(static_cast<double>(region)); }

// `chosen` where low_x < x and low_v < v, else `other`
inline F64 where_both(F64 x, double low_x, F64 v, double low_v, F64 chosen, F64 other) {
    return F64::select_lt(F64::set1(low_x), x, F64::select_lt(F64::set1(low_v), v, chosen, other), other);
}

inline F64 classify_lanes(F64 v, F64 x) {
    using R = BesselRegion;
    const F64 zero = F64::set1(0), infinity = F64::set1(__builtin_inf()), square = v * v;
    F64 r = F64::select_lt(F64::set1(8), x, code(R::small_30), code(R::small_8));
    r = F64::select_lt(F64::set1(3), x, r, code(R::small_3));
    r = F64::select_lt(F64::set1(1), x, r, code(R::small_1));
    r = F64::select_lt(F64::set1(12.7), v, code(R::u_20), where_both(x, 19.6931, v, 0.7, code(R::u_20), r));
    r = F64::select_lt(F64::set1(30), v, code(R::u_13), where_both(x, 35.9074, v, 0.6, code(R::u_13), r));
    r = F64::select_lt(F64::set1(57), v, code(R::u_9), where_both(x, 84.4153, v, 0.46, code(R::u_9), r));
    r = F64::select_lt(F64::set1(164), v, code(R::u_7), where_both(x, 274.2377, v, 0.3, code(R::u_7), r));
    r = F64::select_lt(F64::set1(30), x, F64::select_lt(square, F64::set1(2) * x, code(R::mu_20), r), r);
    r = F64::select_lt(F64::set1(1400), x, F64::select_lt(v, F64::set1(3.05), code(R::mu_3), r), r);
    r = F64::select_lt(F64::set1(3.1), v, F64::select_lt(square, F64::set1(0.002) * x, code(R::mu_3), r), r);
    // comparisons with NaN are false
    const F64 limit = code(R::limit);
    r = F64::select_lt(zero, x, F64::select_lt(x, infinity, r, limit), limit);
    return F64::select_lt(v, zero, limit, F64::select_lt(v, infinity, r, limit));
}

void elementary(int which, const double* logs, const double* x, double* y, int64_t n) {
    const Log log{logs};
    for (int64_t i = 0; i < n; i += F64::lanes) {
        const F64 a = F64::load(x + i);
        (which == 0 ? log.exp(a) : which == 1 ? log.exp_minus_1(a) : which == 2 ? log(a) : log.plus_1(a)).store(y + i);
    }
}

void classify(const double* v, const double* x, uint8_t* regions, int64_t n) {
    for (int64_t i = 0; i < n; i += F64::lanes) classify_lanes(F64::load(v + i), F64::load(x + i)).store_codes(regions + i);
}

}  // namespace
