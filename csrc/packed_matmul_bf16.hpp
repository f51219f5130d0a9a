// Products with packed rows on AVX512_BF16, for every way of finding bfloat16 numbers in the codes (`Decode`):
//     bits, block (codes a step), bytes (of a step), digits (vectors of 32 numbers a step), codes (of a 16-bit lane, so vectors of x a step)
//     load(bytes): what is made once of 64 bytes, the step's and maybe some behind them;  values(loaded, k): digit k of every lane, as bfloat16
// Lane l of 16 bits holds codes [l codes, (l + 1) codes) of a step, and x is brought into this order once a call: vector c holds x[l codes + c]. So
// vdpbf16ps sums pairs of lanes into lanes of 32 bits, which each lie in one group. A float32 x enters as two bfloat16, x = hi + lo + O(2^-17 x).
#pragma once

#include <immintrin.h>

#include "bfloat16.hpp"
#include "fetch_avx512.hpp"
#include "packed_matmul_row.hpp"
#include "scales_avx512.hpp"

namespace {

template <class Decode>
int64_t steps(const dither::PackedMatmul& p) { return (p.columns + Decode::block - 1) / Decode::block; }

template <class Decode>
int64_t values_a_token(const dither::PackedMatmul& p) { return steps<Decode>(p) * Decode::codes * (p.exact ? 64 : 32); }

template <class Decode>
int64_t ready_bytes(const dither::PackedMatmul& p) { return p.tokens * values_a_token<Decode>(p) * 2; }

// [token][step][code of a lane][hi, lo][32 lanes]
template <class Decode>
void prepare(const dither::PackedMatmul& p, void* ready) {
    uint16_t* to = static_cast<uint16_t*>(ready);
    for (int64_t t = 0; t < p.tokens; ++t)
        for (int64_t s = 0; s < steps<Decode>(p); ++s)
            for (int c = 0; c < Decode::codes; ++c, to += p.exact ? 64 : 32)
                for (int lane = 0; lane < 32; ++lane) {
                    const int64_t i = s * Decode::block + lane * Decode::codes + c;
                    const float x = i < p.columns ? p.x[t * p.columns + i] : 0.0f;
                    to[lane] = to_bfloat16(x);
                    if (p.exact) to[32 + lane] = to_bfloat16(x - std::bit_cast<float>(static_cast<uint32_t>(to[lane]) << 16));
                }
}

// Every 32-bit lane must lie in one group, and groups and steps must divide one another.
template <class Decode>
bool fits(const dither::PackedMatmul& p) {
    constexpr int64_t lane = 2 * Decode::codes, block = Decode::block;
    return p.group >= p.columns || (p.group % lane == 0 && (p.group % block == 0 || block % p.group == 0));
}

// lanes i and i + 8, then i + 4, i + 2, i + 1, as _mm512_reduce_add_ps adds them
void sums_of(const __m512 (&x)[4], float* y) {
    const auto halves = [](__m512 a, __m512 b) {  // 8 lanes of a, 8 of b
        return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xEE));
    };
    const __m512 ab = halves(x[0], x[1]), cd = halves(x[2], x[3]);
    const __m512 quads = _mm512_add_ps(_mm512_shuffle_f32x4(ab, cd, 0x88), _mm512_shuffle_f32x4(ab, cd, 0xDD));  // 4 lanes of each
    const __m512 pairs = _mm512_add_ps(quads, _mm512_permute_ps(quads, 0x4E)), all = _mm512_add_ps(pairs, _mm512_permute_ps(pairs, 0xB1));
    const __m512i firsts = _mm512_setr_epi32(0, 4, 8, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0);
    _mm_storeu_ps(y, _mm512_castps512_ps128(_mm512_permutexvar_ps(firsts, all)));
}

// How scales come in: at the end of a group, or of a step that holds several. Lane l of a step of several groups lies in group `of_lane[l]` of it.
struct Groups {
    int64_t a_step, steps;  // groups of a step; steps of a group
    __m512i of_lane;
};

template <class Decode>
Groups groups_of(const dither::PackedMatmul& p) {
    if (p.group >= p.columns) return {1, steps<Decode>(p), _mm512_setzero_si512()};
    if (p.group >= Decode::block) return {1, p.group / Decode::block, _mm512_setzero_si512()};
    alignas(64) int32_t index[16];
    for (int lane = 0; lane < 16; ++lane) index[lane] = static_cast<int32_t>(lane * 2 * Decode::codes / p.group);
    return {Decode::block / p.group, 1, _mm512_load_si512(index)};
}

// R rows of the matrix on T tokens; `x`, `sums` and `y` are those of the first token. A vector of x serves all rows, what is decoded all tokens; the sums
// hide each other's latency. The scales of sixteen groups stay in a register, from which each group takes its own.
template <class Decode, bool exact, int R, int T>
void tile(const dither::PackedMatmul& p, const Decode& decode, const Groups& groups, const Ahead& ahead, int64_t row, const uint16_t* x, const float* sums,
          float* y) {
    constexpr int parts = exact ? 2 : 1, shared = Decode::digits / Decode::codes;  // digits of one code
    constexpr int64_t step_values = 32 * Decode::codes * parts;
    const int64_t bytes = dither::packed_stride(p.columns, Decode::bits), count = steps<Decode>(p), next_token = count * step_values;
    const uint8_t* const from = p.packed + row * bytes;
    const __m512i next = _mm512_set1_epi32(static_cast<int>(groups.a_step));
    __m512 total[R * T], sum[R * T], scales[R];
    __m512i group = groups.of_lane;
    fetch_grid(p, row + ahead.rows, R);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
        scales[r] = scales_from(p, row + r, 0);
#pragma GCC unroll 4
        for (int t = 0; t < T; ++t) {
            __m512 off = _mm512_setzero_ps();
            if (has_late_zeros(p)) {
                off = without_zeros(p, row + r, 0, scales[r], sums + t * p.groups, off);
                for (int64_t g = 16; g < p.groups; g += 16) off = without_zeros(p, row + r, g, scales_from(p, row + r, g), sums + t * p.groups, off);
            }
            total[r * T + t] = off;
            sum[r * T + t] = _mm512_setzero_ps();
        }
    }
    for (int64_t s = 0, g = 0, until = groups.steps; s < count; ++s, x += step_values) {
        const int64_t at = s * Decode::bytes, left = bytes - at;
        decltype(decode.load(__m512i{})) loaded[R];
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
            const uint8_t* const codes = from + r * bytes + at;
            loaded[r] = decode.load(left >= 64 ? _mm512_loadu_si512(codes) : _mm512_maskz_loadu_epi8((__mmask64{1} << left) - 1, codes));
            if (Decode::bytes == 64 || at % 64 < Decode::bytes) fetch(codes + ahead.bytes);
        }
#pragma GCC unroll 8
        for (int k = 0; k < Decode::digits; ++k) {
            __m512bh values[R];
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) values[r] = reinterpret_cast<__m512bh>(decode.values(loaded[r], k));
#pragma GCC unroll 2
            for (int part = 0; part < parts; ++part)
#pragma GCC unroll 4
                for (int t = 0; t < T; ++t) {
                    const __m512bh input = reinterpret_cast<__m512bh>(_mm512_loadu_si512(x + t * next_token + 32 * (k / shared * parts + part)));
#pragma GCC unroll 4
                    for (int r = 0; r < R; ++r) sum[r * T + t] = _mm512_dpbf16_ps(sum[r * T + t], values[r], input);
                }
        }
        if (--until && s + 1 < count) continue;
        until = groups.steps;
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
            const __m512 scale = _mm512_permutexvar_ps(group, scales[r]);
#pragma GCC unroll 4
            for (int t = 0; t < T; ++t) {
                total[r * T + t] = _mm512_fmadd_ps(scale, sum[r * T + t], total[r * T + t]);
                sum[r * T + t] = _mm512_setzero_ps();
            }
        }
        group = _mm512_add_epi32(group, next);
        g += groups.a_step;
        if (g % 16 != 0) continue;
        for (int r = 0; g < p.groups && r < R; ++r) scales[r] = scales_from(p, row + r, g);
        group = groups.of_lane;
    }
    float of[R * T];
    if constexpr (R * T >= 4) sums_of({total[0], total[1], total[2], total[3]}, of);
    if constexpr (R * T == 8) sums_of({total[4], total[5], total[6], total[7]}, of + 4);
#pragma GCC unroll 4
    for (int i = R * T / 4 * 4; i < R * T; ++i) of[i] = _mm512_reduce_add_ps(total[i]);
    for (int r = 0; r < R; ++r)
        for (int t = 0; t < T; ++t) y[t * p.rows + row + r] = of[r * T + t];
}

template <class Decode, bool exact, int T>
void rows_of(const dither::PackedMatmul& p, const Decode& decode, const Groups& groups, int64_t t, int64_t first, int64_t last) {
    constexpr int R = 4;
    const uint16_t* const x = static_cast<const uint16_t*>(p.ready) + t * values_a_token<Decode>(p);
    const float* const sums = p.sums + t * p.groups;
    float* const y = p.y + t * p.rows;
    const Ahead ahead(dither::packed_stride(p.columns, Decode::bits), R);
    int64_t o = first;
    for (; o + R <= last; o += R) tile<Decode, exact, R, T>(p, decode, groups, ahead, o, x, sums, y);
    for (; o < last; ++o) tile<Decode, exact, 1, T>(p, decode, groups, ahead, o, x, sums, y);
}

template <class Decode, bool exact>
void all_rows(const dither::PackedMatmul& p, int64_t first, int64_t last) {
    const Decode decode(p);
    const Groups groups = groups_of<Decode>(p);
    int64_t t = 0;
    for (; t + 2 <= p.tokens; t += 2) rows_of<Decode, exact, 2>(p, decode, groups, t, first, last);
    if (t < p.tokens) rows_of<Decode, exact, 1>(p, decode, groups, t, first, last);
}

template <class Decode>
void rows(const dither::PackedMatmul& p, int64_t first, int64_t last, float*) {
    if (p.exact) all_rows<Decode, true>(p, first, last);
    else all_rows<Decode, false>(p, first, last);
}

template <class Decode>
dither::PackedKernel kernel_if_it_fits(const dither::PackedMatmul& p) {
    if (!fits<Decode>(p)) return {nullptr, nullptr, nullptr};
    return {ready_bytes<Decode>, prepare<Decode>, rows<Decode>};
}

}  // namespace
