// Codes of 4 bits in groups of 32, 64 or 128. A step is 64 bytes of a row, 128 codes; lane l of 16 bits holds codes 4l .. 4l + 3, and code k of all lanes
// becomes 32 bfloat16 by a shift and a table (packed_matmul_avx512bf16.cpp). Four rows go side by side, on one token or two: a vector of x serves
// four products, decoded codes two tokens, sums hide each other's latency, and the last additions across lanes are done for four sums at once, in the
// order in which one's are done. The scales of sixteen groups stay in a register, from which each step takes its own.
#include <immintrin.h>

#include "packed_row.hpp"
#include "packing.hpp"
#include "scales_avx512.hpp"
#include "tables_avx512.hpp"

namespace {

using dither::PackedMatmul;

constexpr int64_t block = 128, step_bytes = 64, ahead = 4096;
constexpr int codes = 4;

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

// R rows of the matrix on T tokens; `x`, `sums` and `y` are those of the first token
template <bool exact, int R, int T>
void tile(const PackedMatmul& p, __m512i table, __m512i lane_group, int64_t row, const uint16_t* x, const float* sums, float* y) {
    constexpr int parts = exact ? 2 : 1;
    const int64_t bytes = dither::packed_stride(p.columns, 4), steps = (p.columns + block - 1) / block, groups_a_step = block / p.group;
    const int64_t next_token = steps * 32 * codes * parts;
    const uint8_t* const from = p.packed + row * bytes;
    const __m512i next = _mm512_set1_epi32(static_cast<int>(groups_a_step));
    __m512 total[R * T], scales[R];
    __m512i group = lane_group;
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
        }
    }
    for (int64_t s = 0, g = 0; s < steps; ++s, g += groups_a_step, x += 32 * codes * parts) {
        if (s && g % 16 == 0) {
            for (int r = 0; r < R; ++r) scales[r] = scales_from(p, row + r, g);
            group = lane_group;
        }
        const int64_t at = s * step_bytes, left = bytes - at;
        const __mmask64 there = left >= step_bytes ? ~__mmask64{0} : (__mmask64{1} << left) - 1;
        __m512i loaded[R];
        __m512 sum[R * T];
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
            loaded[r] = _mm512_maskz_loadu_epi8(there, from + r * bytes + at);
            _mm_prefetch(reinterpret_cast<const char*>(from + r * bytes + at + ahead), _MM_HINT_T0);
        }
#pragma GCC unroll 8
        for (int i = 0; i < R * T; ++i) sum[i] = _mm512_setzero_ps();
#pragma GCC unroll 4
        for (int k = 0; k < codes; ++k) {
            __m512bh values[R];
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r)
                values[r] = reinterpret_cast<__m512bh>(_mm512_permutexvar_epi16(_mm512_srli_epi16(loaded[r], 4 * k), table));
#pragma GCC unroll 2
            for (int part = 0; part < parts; ++part)
#pragma GCC unroll 4
                for (int t = 0; t < T; ++t) {
                    const __m512bh input = reinterpret_cast<__m512bh>(_mm512_loadu_si512(x + t * next_token + 32 * (k * parts + part)));
#pragma GCC unroll 4
                    for (int r = 0; r < R; ++r) sum[r * T + t] = _mm512_dpbf16_ps(sum[r * T + t], values[r], input);
                }
        }
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
            const __m512 scale = _mm512_permutexvar_ps(group, scales[r]);
#pragma GCC unroll 4
            for (int t = 0; t < T; ++t) total[r * T + t] = _mm512_fmadd_ps(scale, sum[r * T + t], total[r * T + t]);
        }
        group = _mm512_add_epi32(group, next);
    }
    float of[R * T];
    if constexpr (R * T >= 4) sums_of({total[0], total[1], total[2], total[3]}, of);
    if constexpr (R * T == 8) sums_of({total[4], total[5], total[6], total[7]}, of + 4);
#pragma GCC unroll 4
    for (int i = R * T / 4 * 4; i < R * T; ++i) of[i] = _mm512_reduce_add_ps(total[i]);
    for (int r = 0; r < R; ++r)
        for (int t = 0; t < T; ++t) y[t * p.rows + row + r] = of[r * T + t];
}

template <bool exact, int T>
void rows_of(const PackedMatmul& p, __m512i table, __m512i lane_group, int64_t t, int64_t first, int64_t last) {
    constexpr int R = 4;
    const uint16_t* const x = static_cast<const uint16_t*>(p.ready) + t * ((p.columns + block - 1) / block * 32 * codes * (exact ? 2 : 1));
    const float* const sums = p.sums + t * p.groups;
    float* const y = p.y + t * p.rows;
    int64_t o = first;
    for (; o + R <= last; o += R) tile<exact, R, T>(p, table, lane_group, o, x, sums, y);
    for (; o < last; ++o) tile<exact, 1, T>(p, table, lane_group, o, x, sums, y);
}

template <bool exact>
void rows(const PackedMatmul& p, int64_t first, int64_t last) {
    const __m512i table = meanings(p, 0, 15);
    alignas(64) int32_t index[16];
    for (int lane = 0; lane < 16; ++lane) index[lane] = static_cast<int32_t>(lane * 2 * codes / p.group);
    const __m512i lane_group = _mm512_load_si512(index);
    int64_t t = 0;
    for (; t + 2 <= p.tokens; t += 2) rows_of<exact, 2>(p, table, lane_group, t, first, last);
    if (t < p.tokens) rows_of<exact, 1>(p, table, lane_group, t, first, last);
}

}  // namespace

namespace dither {

PackedRow packed_row_avx512bf16(const PackedMatmul& p) {
    if (p.bits != 4 || (p.group != 32 && p.group != 64 && p.group != 128) || !fits_bfloat16(p)) return nullptr;
    return p.exact ? rows<true> : rows<false>;
}

}  // namespace dither
