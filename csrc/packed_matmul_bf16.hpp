// Products with packed rows on AVX512_BF16, for every way of finding bfloat16 numbers in the codes (`Decode`):
//     bits, block (codes a step), bytes (of a step), digits (vectors of 32 numbers a step), codes (of a 16-bit lane, so vectors of x a step)
//     load(from, there): a step's bytes, or what is made of them once;  values(loaded, k): digit k of every lane, as bfloat16
// Lane l of 16 bits holds codes [l codes, (l + 1) codes) of a step, and x is brought into this order once a call: vector c holds x[l codes + c]. So
// vdpbf16ps sums pairs of lanes into lanes of 32 bits, which each lie in one group. A float32 x enters as two bfloat16, x = hi + lo + O(2^-17 x).
#pragma once

#include <immintrin.h>

#include "bfloat16.hpp"
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

// The row's scales, and zeros behind the last.
inline void read_row(const dither::PackedMatmul& p, int64_t o, float* scales) {
    for (int64_t g = 0; g < p.groups; g += 16) _mm512_storeu_ps(scales + g, scales_from(p, o, g));
    _mm512_storeu_ps(scales + p.groups, _mm512_setzero_ps());
}

// What the zero points take off a row's product with a token.
inline __m512 zeros_off(const dither::PackedMatmul& p, int64_t o, int64_t t, const float* scales) {
    __m512 total = _mm512_setzero_ps();
    for (int64_t g = 0; has_late_zeros(p) && g < p.groups; g += 16)
        total = without_zeros(p, o, g, _mm512_loadu_ps(scales + g), p.sums + t * p.groups, total);
    return total;
}

// R rows on T tokens: what is loaded of x serves all rows, what is decoded of a row all tokens.
template <class Decode, bool exact, int R, int T>
void tile(const dither::PackedMatmul& p, const Decode& decode, int64_t o, int64_t t0, const float* scales, int64_t scales_next, __m512i group_of) {
    constexpr int parts = exact ? 2 : 1;
    const int64_t bytes = dither::packed_stride(p.columns, Decode::bits), next = values_a_token<Decode>(p), count = steps<Decode>(p);
    const uint8_t* const from = p.packed + o * bytes;
    const uint16_t* x = static_cast<const uint16_t*>(p.ready) + t0 * next;
    // scales come in at the end of a group, or of a step that holds several
    const bool long_groups = p.group > Decode::block;
    const int64_t steps_a_group = !long_groups ? 1 : p.group >= p.columns ? count : p.group / Decode::block;
    const int64_t groups_a_step = long_groups ? 1 : Decode::block / p.group;
    int64_t group = 0, until = steps_a_group;
    const int64_t ahead = R * bytes * ((4096 + R * bytes - 1) / (R * bytes));  // the same place some 4 KiB of rows on: the next ones are fetched meanwhile
    __m512 total[R][T], sum[R][T];
    for (int r = 0; r < R; ++r)
        for (int t = 0; t < T; ++t) {
            total[r][t] = zeros_off(p, o + r, t0 + t, scales + r * scales_next);
            sum[r][t] = _mm512_setzero_ps();
        }
    for (int64_t s = 0; s < count; ++s, x += 32 * Decode::codes * parts) {
        const int64_t at = s * Decode::bytes, left = bytes - at, width = left < Decode::bytes ? left : Decode::bytes;
        const __mmask64 there = width >= 64 ? ~__mmask64{0} : (__mmask64{1} << width) - 1;
        decltype(decode.load(from, there)) loaded[R];
        for (int r = 0; r < R; ++r) {
            loaded[r] = decode.load(from + r * bytes + at, there);
            if (Decode::bytes == 64 || at % 64 < Decode::bytes) _mm_prefetch(reinterpret_cast<const char*>(from + r * bytes + at + ahead), _MM_HINT_T0);
        }
#pragma GCC unroll 8
        for (int k = 0; k < Decode::digits; ++k) {
            __m512bh values[R];
            for (int r = 0; r < R; ++r) values[r] = reinterpret_cast<__m512bh>(decode.values(loaded[r], k));
            constexpr int shared = Decode::digits / Decode::codes;  // digits of one code
            for (int t = 0; t < T; ++t)
                for (int part = 0; part < parts; ++part) {
                    const __m512bh input = reinterpret_cast<__m512bh>(_mm512_loadu_si512(x + t * next + 32 * (k / shared * parts + part)));
                    for (int r = 0; r < R; ++r) sum[r][t] = _mm512_dpbf16_ps(sum[r][t], values[r], input);
                }
        }
        if (--until && s + 1 < count) continue;
        until = steps_a_group;
        for (int r = 0; r < R; ++r) {
            const __m512 scale = _mm512_permutexvar_ps(group_of, _mm512_loadu_ps(scales + r * scales_next + group));
            for (int t = 0; t < T; ++t) {
                total[r][t] = _mm512_fmadd_ps(scale, sum[r][t], total[r][t]);
                sum[r][t] = _mm512_setzero_ps();
            }
        }
        group += groups_a_step;
    }
    for (int r = 0; r < R; ++r)
        for (int t = 0; t < T; ++t) p.y[(t0 + t) * p.rows + o + r] = _mm512_reduce_add_ps(total[r][t]);
}

template <class Decode, bool exact, int R>
void rows_of(const dither::PackedMatmul& p, const Decode& decode, int64_t o, float* scales, __m512i group_of) {
    const int64_t next = p.groups + 32;
    for (int r = 0; r < R; ++r) read_row(p, o + r, scales + r * next);
    int64_t t = 0;
    for (; t + 4 <= p.tokens; t += 4) tile<Decode, exact, R, 4>(p, decode, o, t, scales, next, group_of);
    for (; t < p.tokens; ++t) tile<Decode, exact, R, 1>(p, decode, o, t, scales, next, group_of);
}

template <class Decode, bool exact>
void all_rows(const dither::PackedMatmul& p, int64_t first, int64_t last, float* scales) {
    const Decode decode(p);
    alignas(64) int32_t index[16];
    for (int lane = 0; lane < 16; ++lane) index[lane] = static_cast<int32_t>(p.group >= Decode::block ? 0 : lane * 2 * Decode::codes / p.group);
    const __m512i group_of = _mm512_load_si512(index);
    int64_t o = first;
    for (; o + 2 <= last; o += 2) rows_of<Decode, exact, 2>(p, decode, o, scales, group_of);
    for (; o < last; ++o) rows_of<Decode, exact, 1>(p, decode, o, scales, group_of);
}

template <class Decode>
void rows(const dither::PackedMatmul& p, int64_t first, int64_t last, float* scales) {
    if (p.exact)
        all_rows<Decode, true>(p, first, last, scales);
    else
        all_rows<Decode, false>(p, first, last, scales);
}

template <class Decode>
dither::PackedKernel kernel_if_it_fits(const dither::PackedMatmul& p) {
    if (!fits<Decode>(p)) return {nullptr, nullptr, nullptr};
    return {ready_bytes<Decode>, prepare<Decode>, rows<Decode>};
}

}  // namespace
