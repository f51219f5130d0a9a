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

// Sums of T rows of q with outputs o .. o + 4, for `first` .. `last` of the steps: to[step][token][..]
template <class K, int T>
void sums_of_rows(const dither::Int8Matmul& p, const typename K::Decoder& decoder, const Steps& steps, int64_t o, int64_t t0, int64_t first,
                  int64_t last, typename K::Int* to) {
    using Int = typename K::Int;
    constexpr int64_t step = 4 * Int::lanes;
    const int64_t stride = dither::packed_stride(p.columns, p.bits), bytes = step * p.bits / 8;
    const int64_t width = steps.several ? step : p.group;
    const uint8_t* const end = p.packed + p.rows * stride;
    const uint8_t* rows[4];
    for (int r = 0; r < 4; ++r) rows[r] = p.packed + (o + r < p.rows ? o + r : p.rows - 1) * stride;
    for (int64_t u = first; u < last; ++u, to += p.inputs() * Int::blocks) {
        const int64_t bit = u * width * p.bits;
        const auto aim = decoder.aim(static_cast<int>(bit % 8));
        const int8_t* q = p.q + t0 * p.q_stride + u * steps.length * step;
        Int sum[T][4];
        for (int t = 0; t < T; ++t)
            for (int r = 0; r < 4; ++r) sum[t][r] = Int::zero();
        for (int64_t s = 0, at = bit / 8; s < steps.length; ++s, at += bytes, q += step) {
            typename K::Code code[4];
            for (int r = 0; r < 4; ++r) {
                uint8_t tail[K::Decoder::reach];
                code[r] = decoder.codes(readable(before(rows[r] + at, end), end, tail), aim);
            }
            for (int t = 0; t < T; ++t) {
                const typename K::Input input = K::input(Int::load(q + t * p.q_stride));
                for (int r = 0; r < 4; ++r) sum[t][r] = K::dot(sum[t][r], code[r], input);
            }
        }
        for (int t = 0; t < T; ++t) to[(t0 + t) * Int::blocks] = Int::sum4(sum[t]);
    }
}

template <class K>
void few(const dither::Int8Matmul& p, int64_t first, int64_t last, char* scratch) {
    using Int = typename K::Int;
    using Float = typename K::Float;
    constexpr int64_t L = Int::lanes, B = Int::blocks;
    const typename K::Decoder decoder(p.bits, p.group * p.bits % 8 != 0);
    const Steps steps(p, L);
    const int64_t inputs = p.inputs(), blocks_a_group = steps.several ? p.padded / 16 : B, groups_a_step = B / blocks_a_group;
    float* const scales = reinterpret_cast<float*>(scratch);
    int32_t* const zeros = reinterpret_cast<int32_t*>(scales + grid_size<Int>(p));
    Int* const sums = reinterpret_cast<Int*>(zeros + grid_size<Int>(p));
    for (int64_t o = first; o < last; o += L) {
        grid_of<Int>(p, o, scales, zeros);
        Float y[dither::few_tokens];
        for (int64_t t = 0; t < p.tokens; ++t) y[t] = Float::set1(0);
        for (int64_t from = 0; from < steps.count; from += steps.at_a_time) {
            const int64_t to = from + steps.at_a_time < steps.count ? from + steps.at_a_time : steps.count;
            for (int64_t b = 0; b < B; ++b) {
                int64_t t = 0;
                for (; t + 4 <= inputs; t += 4) sums_of_rows<K, 4>(p, decoder, steps, o + 4 * b, t, from, to, sums + b);
                if (inputs - t == 3) sums_of_rows<K, 3>(p, decoder, steps, o + 4 * b, t, from, to, sums + b);
                if (inputs - t == 2) sums_of_rows<K, 2>(p, decoder, steps, o + 4 * b, t, from, to, sums + b);
                if (inputs - t == 1) sums_of_rows<K, 1>(p, decoder, steps, o + 4 * b, t, from, to, sums + b);
            }
            for (int64_t u = from; u < to; ++u) {
                Int pointed[B] = {};  // sums of (code - zero), a vector a group
                for (int64_t t = inputs; t-- > 0;) {
                    Int block[B];
                    for (int64_t b = 0; b < B; ++b) block[b] = sums[((u - from) * inputs + t) * B + b];
                    Int::transpose_blocks(block);
                    for (int64_t k = 0, b = 0; k < groups_a_step; ++k) {
                        const int64_t g = steps.several ? u * groups_a_step + k : u;
                        if (g >= p.groups) break;
                        Int sum = block[b++];
                        for (int64_t more = 1; more < blocks_a_group; ++more) sum = sum + block[b++];
                        sum = sum - Int::load(zeros + g * L) * Int::set1(p.sums[t * p.groups + g]);
                        if (t == p.tokens) {
                            pointed[k] = sum;
                            continue;
                        }
                        if (p.pointed()) sum = sum - pointed[k] * Int::set1(p.points[t]);
                        y[t] = Float::fmadd(Float::load(scales + g * L), sum.floats(), y[t]);
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
