// exp, expm1, log and log1p of vectors of doubles, and a logarithm in two parts, written once for every instruction set. Errors below 1 ulp
// (tests/kernels/test_bessel_math.py). Include after one of bits_f64_*.hpp.
#pragma once

namespace {

// a + b = sum + error (Knuth)
inline F64 sum(F64 a, F64 b, F64& error) {
    const F64 s = a + b, c = s - a;
    error = (a - (s - c)) + (b - c);
    return s;
}

// `logs`: [129, 3] of dither/special/bessel_tables.py: 1 / m to ten bits, -log of that in two parts; log 2 in the last row
struct Log {
    const double* logs;

    // log(m 2^k (1 + rest)) = high + low for m in [1, 2), to about 2^-66
    void parts(F64 m, F64 k, F64 rest, F64& high, F64& low) const {
        const F64 row = floor((m - F64::set1(1)) * F64::set1(128)) * F64::set1(3);
        F64 r_low;
        const F64 r = product(m, gather(logs, row), r_low) - F64::set1(1);
        F64 tail = F64::set1(-1.0 / 10);
        tail = F64::fmadd(tail, r, F64::set1(1.0 / 9));
        tail = F64::fmadd(tail, r, F64::set1(-1.0 / 8));
        tail = F64::fmadd(tail, r, F64::set1(1.0 / 7));
        tail = F64::fmadd(tail, r, F64::set1(-1.0 / 6));
        tail = F64::fmadd(tail, r, F64::set1(1.0 / 5));
        tail = F64::fmadd(tail, r, F64::set1(-1.0 / 4));
        tail = F64::fmadd(tail, r, F64::set1(1.0 / 3));
        tail = F64::fmadd(tail, r, F64::set1(-1.0 / 2));
        F64 error;  // k log 2 + -log c is exact in the high parts
        const F64 s = sum(F64::fmadd(k, F64::set1(logs[128 * 3 + 1]), gather(logs + 1, row)), r, error);
        const F64 small = F64::fmadd(k, F64::set1(logs[128 * 3 + 2]), gather(logs + 2, row)) + F64::fnmadd(r_low, r, r_low);
        error = error + (small + F64::fmadd(tail, r * r, rest));
        high = s + error;
        low = (s - high) + error;
    }

    F64 operator()(F64 a, F64 rest = F64::set1(0)) const {  // log(a (1 + rest)), a > 0
        F64 m, k, high, low;
        split(a, m, k);
        parts(m, k, rest, high, low);
        return high;
    }

    F64 plus_1(F64 a) const {  // log(1 + a), a > -1
        F64 error;
        const F64 s = sum(F64::set1(1), a, error);
        return (*this)(s, error / s);
    }

    // a = k log 2 + r, |r| <= log 2 / 2; returns exp(r) - 1
    F64 reduced(F64 a, F64& k) const {
        k = F64::round(a * F64::set1(1.4426950408889634));
        const F64 r = F64::fnmadd(k, F64::set1(logs[128 * 3 + 2]), F64::fnmadd(k, F64::set1(logs[128 * 3 + 1]), a));
        F64 tail = F64::set1(1.0 / 6227020800);  // 1 / 13!
        tail = F64::fmadd(tail, r, F64::set1(1.0 / 479001600));
        tail = F64::fmadd(tail, r, F64::set1(1.0 / 39916800));
        tail = F64::fmadd(tail, r, F64::set1(1.0 / 3628800));
        tail = F64::fmadd(tail, r, F64::set1(1.0 / 362880));
        tail = F64::fmadd(tail, r, F64::set1(1.0 / 40320));
        tail = F64::fmadd(tail, r, F64::set1(1.0 / 5040));
        tail = F64::fmadd(tail, r, F64::set1(1.0 / 720));
        tail = F64::fmadd(tail, r, F64::set1(1.0 / 120));
        tail = F64::fmadd(tail, r, F64::set1(1.0 / 24));
        tail = F64::fmadd(tail, r, F64::set1(1.0 / 6));
        tail = F64::fmadd(tail, r, F64::set1(0.5));
        return F64::fmadd(tail, r * r, r);
    }

    F64 exp(F64 a) const {  // of -708 below that
        F64 k;
        const F64 grown = reduced(F64::clamp(a, F64::set1(-708), F64::set1(709)), k);
        return times_power(F64::set1(1) + grown, k);
    }

    F64 exp_minus_1(F64 a) const {
        F64 k;
        const F64 grown = reduced(F64::clamp(a, F64::set1(-708), F64::set1(709)), k);
        const F64 power = times_power(F64::set1(1), k);
        return F64::fmadd(power, grown, power - F64::set1(1));
    }
};

}  // namespace
