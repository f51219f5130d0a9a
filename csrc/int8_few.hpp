// Up to `few_tokens` rows of int8_matmul.hpp, written once for every instruction set (`K`: Int, Code, Input, Decoder, dot). Codes are read once, in
// steps of 4 lanes columns, and go no further than registers. Lanes lie along the columns, so a step's sums of four outputs are added within blocks of
// four lanes (`sum4`); transposing the blocks of `lanes` outputs brings them side by side. A step lies in one group, or holds several whole ones.
#pragma once

#include "int8_grid.hpp"
#include "packing.hpp"

namespace {

struct Steps {
    bool several;       // groups a step, else steps a group
    int64_t count;      // what `sums` counts: steps or groups
    int64_t length;     // steps of one of these
    int64_t at_a_time;  // so many before their sums are used: they stay in the first cache

    Steps(const dither::Int8Matmul& p, int lanes)
        : several(p.padded < 4 * lanes),
          count(several ? (p.columns + 4 * lanes - 1) / (4 * lanes) : p.groups),
          length(several ? 1 : p.padded / (4 * lanes)),
          at_a_time(1 + 256 / (p.inputs() * lanes)) {}
};

template <class Int>
std::size_t few_bytes(const dither::Int8Matmul& p) {
    return 8 * grid_size<Int>(p) + sizeof(Int) * Int::blocks * p.inputs() * Steps(p, Int::lanes).at_a_time;
}

// Sums of T rows of q with outputs o .. o + 4, for `first` .. `last` of the steps: to[step][token][..]. `inside`: every step may be read whole.
template <class K, int T, bool inside>
void sums_of_rows(const dither::Int8Matmul& p, const typename K::Decoder& decoder, const Steps& steps, int64_t o, int64_t t0, int64_t first,
                  int64_t last, typename K::Int* to) {
    using Int = typename K::Int;
    constexpr int64_t step = 4 * Int::lanes;
    // what is written may be anything to the compiler, so what the loops need is copied
    const int64_t stride = dither::packed_stride(p.columns, p.bits), bytes = step * p.bits / 8, q_stride = p.q_stride, length = steps.length;
    const int64_t bits_a_step = (steps.several ? step : p.group) * p.bits, next = p.inputs() * Int::blocks;
    const uint8_t* const end = p.packed + p.rows * stride;
    const uint8_t* rows[4];
    for (int r = 0; r < 4; ++r) rows[r] = p.packed + (o + r < p.rows ? o + r : p.rows - 1) * stride;
    const int8_t* q = p.q + t0 * q_stride + first * length * step;
    to += t0 * Int::blocks;
    for (int64_t u = first; u < last; ++u, to += next) {
        const uint64_t bit = static_cast<uint64_t>(u * bits_a_step);
        const auto& aim = decoder.aim(static_cast<int>(bit % 8));
        Int sum[T][4];
#pragma GCC unroll 4
        for (int t = 0; t < T; ++t)
#pragma GCC unroll 4
            for (int r = 0; r < 4; ++r) sum[t][r] = Int::zero();
        int64_t at = static_cast<int64_t>(bit / 8);
        for (int64_t s = 0; s < length; ++s, at += bytes, q += step) {
            typename K::Code code[4];
#pragma GCC unroll 4
            for (int r = 0; r < 4; ++r) {
                if constexpr (inside) {
                    code[r] = decoder.codes(rows[r] + at, aim);
                } else {
                    uint8_t tail[K::Decoder::reach];
                    code[r] = decoder.codes(readable(before(rows[r] + at, end), end, tail), aim);
                }
            }
#pragma GCC unroll 4
            for (int t = 0; t < T; ++t) {
                const typename K::Input input = K::input(Int::load(q + t * q_stride));
#pragma GCC unroll 4
                for (int r = 0; r < 4; ++r) sum[t][r] = K::dot(sum[t][r], code[r], input);
            }
        }
#pragma GCC unroll 4
        for (int t = 0; t < T; ++t) to[t * Int::blocks] = Int::sum4(sum[t]);
    }
}

// The same for all rows of q.
template <class K, bool inside>
void sums_of_all(const dither::Int8Matmul& p, const typename K::Decoder& decoder, const Steps& steps, int64_t o, int64_t first, int64_t last,
                 typename K::Int* to) {
    int64_t t = 0;
    for (; t + 4 <= p.inputs(); t += 4) sums_of_rows<K, 4, inside>(p, decoder, steps, o, t, first, last, to);
    switch (p.inputs() - t) {
        case 3: sums_of_rows<K, 3, inside>(p, decoder, steps, o, t, first, last, to); break;
        case 2: sums_of_rows<K, 2, inside>(p, decoder, steps, o, t, first, last, to); break;
        case 1: sums_of_rows<K, 1, inside>(p, decoder, steps, o, t, first, last, to); break;
        default: break;
    }
}

// y += scale E for one group of `lanes` outputs, of which `sums` has the products with one row of q. For the row of ones, `pointed` becomes E instead.
template <class K>
inline void add_group(const dither::Int8Matmul& p, int64_t g, int64_t t, typename K::Int sum, const float* scales, const int32_t* zeros,
                      typename K::Int& pointed, typename K::Float* y) {
    using Int = typename K::Int;
    using Float = typename K::Float;
    constexpr int64_t L = Int::lanes;
    sum = sum - Int::load(zeros + g * L) * Int::set1(p.sums[t * p.groups + g]);
    if (t == p.tokens) {
        pointed = sum;
        return;
    }
    if (p.pointed()) sum = sum - pointed * Int::set1(p.points[t]);
    y[t] = Float::fmadd(Float::load(scales + g * L), sum.floats(), y[t]);
}

template <class K>
void few(const dither::Int8Matmul& p, int64_t first, int64_t last, char* scratch) {
    using Int = typename K::Int;
    using Float = typename K::Float;
    constexpr int64_t L = Int::lanes, B = Int::blocks;
    const typename K::Decoder decoder(p.bits, p.group * p.bits % 8 != 0);
    const Steps steps(p, L);
    const int64_t inputs = p.inputs(), stride = dither::packed_stride(p.columns, p.bits);
    const int64_t beyond = steps.count * steps.length * L * p.bits / 2 + K::Decoder::reach;  // what is read from where a row begins, at most
    float* const scales = reinterpret_cast<float*>(scratch);
    int32_t* const zeros = reinterpret_cast<int32_t*>(scales + grid_size<Int>(p));
    Int* const sums = reinterpret_cast<Int*>(zeros + grid_size<Int>(p));
    for (int64_t o = first; o < last; o += L) {
        grid_of<Int>(p, o, scales, zeros);
        const bool inside = (o + L - 1) * stride + beyond <= p.rows * stride;
        Float y[dither::few_tokens];
        for (int64_t t = 0; t < p.tokens; ++t) y[t] = Float::set1(0);
        for (int64_t from = 0; from < steps.count; from += steps.at_a_time) {
            const int64_t to = from + steps.at_a_time < steps.count ? from + steps.at_a_time : steps.count;
            for (int64_t b = 0; b < B; ++b) {
                if (inside)
                    sums_of_all<K, true>(p, decoder, steps, o + 4 * b, from, to, sums + b);
                else
                    sums_of_all<K, false>(p, decoder, steps, o + 4 * b, from, to, sums + b);
            }
            const Int* block = sums;
            for (int64_t u = from; u < to; ++u, block += inputs * B) {
                Int pointed[B] = {};  // a vector a group
                for (int64_t t = inputs; t-- > 0;) {
                    Int sum[B];
                    for (int64_t b = 0; b < B; ++b) sum[b] = block[t * B + b];
                    Int::transpose_blocks(sum);
                    if (!steps.several) {
                        for (int64_t b = 1; b < B; ++b) sum[0] = sum[0] + sum[b];
                        add_group<K>(p, u, t, sum[0], scales, zeros, pointed[0], y);
                        continue;
                    }
                    for (int64_t b = 0, g = u * (16 * B / p.padded); b < B && g < p.groups; ++g) {
                        const int64_t begin = b;
                        Int all = sum[b++];
                        for (; b % (p.padded / 16) != 0; ++b) all = all + sum[b];
                        add_group<K>(p, g, t, all, scales, zeros, pointed[begin], y);
                    }
                }
            }
        }
        for (int64_t t = 0; t < p.tokens; ++t) {
            const Float found = y[t] * Float::set1(p.steps[t]);
            float* const to = p.y + t * p.rows + o;
            if (o + L <= p.rows)
                found.store(to);
            else
                store_first(to, found, p.rows - o);
        }
    }
}

}  // namespace
