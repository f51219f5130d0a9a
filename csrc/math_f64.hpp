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

// `logs`: [3, 33] of dither/special/bessel_tables.py: by nearest multiple of 1/32, 1 / m to ten bits and -log of that in two parts, whose high
// parts are multiples of 2^-42; in the last column the same of 1/2
struct Log {
    const double* logs;

    double two_high() const { return logs[2 * 33 - 1]; }
    double two_low() const { return logs[3 * 33 - 1]; }

    // log(m 2^k (1 + rest)) = high + low for m in [0.75, 1.5], to about 2^-70, or one rounding of it
    template <bool two_parts>
    F64 log(F64 m, F64 k, F64 rest, F64& low) const {
        const Row row(m);
        F64 r_low;
        const F64 r = product(m, row.of(logs), r_low) - F64::set1(1);
        F64 tail = F64::set1(-1.0 / 12);
        tail = F64::fmadd(tail, r, F64::set1(1.0 / 11));
        tail = F64::fmadd(tail, r, F64::set1(-1.0 / 10));
        tail = F64::fmadd(tail, r, F64::set1(1.0 / 9));
        tail = F64::fmadd(tail, r, F64::set1(-1.0 / 8));
        tail = F64::fmadd(tail, r, F64::set1(1.0 / 7));
        tail = F64::fmadd(tail, r, F64::set1(-1.0 / 6));
        tail = F64::fmadd(tail, r, F64::set1(1.0 / 5));
        tail = F64::fmadd(tail, r, F64::set1(-1.0 / 4));
        tail = F64::fmadd(tail, r, F64::set1(1.0 / 3));
        F64 error;  // k log 2 + -log c is exact in the high parts
        const F64 s = sum(F64::fmadd(k, F64::set1(two_high()), row.of(logs + 33)), r, error);
        const F64 small = F64::fmadd(k, F64::set1(two_low()), row.of(logs + 66)) + F64::fnmadd(r_low, r, r_low) + rest;
        const F64 minus_half = F64::set1(-0.5);
        if constexpr (!two_parts) {
            tail = F64::fmadd(tail, r, minus_half);
            return s + (error + F64::fmadd(tail, r * r, small));
        } else {  // r^2 / 2 is large enough for its own rounding to matter
            F64 square_low, more;
            const F64 square = product(r, r, square_low);
            const F64 t = sum(s, minus_half * square, more);
            error = (error + more) + F64::fmadd(minus_half, square_low, F64::fmadd(tail, r * square, small));
            const F64 high = t + error;
            low = (t - high) + error;
            return high;
        }
    }

    F64 operator()(F64 a, F64 rest = F64::set1(0)) const {  // log(a (1 + rest)), a > 0
        F64 m, k, none;
        split(a, m, k);
        return log<false>(m, k, rest, none);
    }

    F64 plus_1(F64 a) const {  // log(1 + a), a > -1
        F64 error;
        const F64 s = sum(F64::set1(1), a, error);
        return (*this)(s, error / s);
    }

    // a = k log 2 + r, |r| <= log 2 / 2; returns exp(r) - 1
    F64 reduced(F64 a, F64& k) const {
        k = F64::round(a * F64::set1(1.4426950408889634));
        const F64 r = F64::fnmadd(k, F64::set1(two_low()), F64::fnmadd(k, F64::set1(two_high()), a));
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
