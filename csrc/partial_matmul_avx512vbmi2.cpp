// Rows of partial_matmul.hpp in registers, 64 columns at a time. Bits of the plane are mask registers as they are, which choose between two levels. The
// salient codes of the columns lie one behind the other in the stream, 8 of them in `rest` bytes: a byte permutation gives each 64-bit lane the bytes of
// eight codes, multishift takes every code out of them, and expand puts each in its column.
#include <immintrin.h>

#include "partial_matmul.hpp"
#include "partial_row.hpp"

namespace {

using dither::PartialMatmul;
using dither::PartialProblem;

// 64 bits of a row of `stride` bytes from column i on, i a multiple of 64; zeros behind its end.
inline uint64_t bits_from(const uint8_t* row, int64_t stride, int64_t i) {
    const int64_t left = stride - i / 8;
    uint64_t bits = 0;
    if (left >= 8) std::memcpy(&bits, row + i / 8, 8);
    else std::memcpy(&bits, row + i / 8, 4);
    return bits;
}

// The codes of 64 columns as bytes, in their places.
struct Codes {
    const PartialProblem& w;
    __m512i place, first, mask, top;

    explicit Codes(const PartialProblem& of) : w(of) {
        alignas(64) uint8_t places[64], firsts[64];
        for (int c = 0; c < 64; ++c) {
            places[c] = static_cast<uint8_t>(w.rest * (c / 8) + c % 8);
            firsts[c] = static_cast<uint8_t>(w.rest * (c % 8));
        }
        place = _mm512_load_si512(places);
        first = _mm512_load_si512(firsts);
        mask = _mm512_set1_epi8(static_cast<char>((1 << w.rest) - 1));
        top = _mm512_set1_epi8(static_cast<char>(1 << w.rest));
    }
    // `at`: the bit of the stream where the first one begins; what lies beyond the stream's end is zero
    __m512i operator()(int64_t at, uint64_t salient, uint64_t plane) const {
        const int64_t left = w.code_bytes - at / 8;
        const uint8_t* const from = w.codes + at / 8;
        const __m512i some = left >= 64 ? _mm512_loadu_si512(from) : _mm512_maskz_loadu_epi8(left <= 0 ? 0 : (__mmask64{1} << left) - 1, from);
        const __m512i bytes = _mm512_permutexvar_epi8(place, some);
        const __m512i shift = _mm512_add_epi8(first, _mm512_set1_epi8(static_cast<char>(at % 8)));
        const __m512i dense = _mm512_and_si512(_mm512_multishift_epi64_epi8(shift, bytes), mask);
        const __m512i spread = _mm512_maskz_expand_epi8(salient, dense);
        return _mm512_mask_add_epi8(spread, plane & salient, spread, top);
    }
};

template <int q>
__m512 sixteen_floats(__m512i codes) { return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm512_extracti32x4_epi32(codes, q))); }

// One row on T tokens: each weight is found once, as the reference finds it.
template <int T>
void row_of_tokens(const PartialMatmul& p, const Codes& codes, int64_t o, int64_t t0) {
    const PartialProblem& w = p.weights;
    const int64_t stride = dither::packed_stride(w.columns, 1);
    const uint8_t* const plane = w.plane + o * stride;
    const uint8_t* const mask = w.mask ? w.mask + o * stride : nullptr;
    const float *low = w.low + o * w.groups, *high = w.high + o * w.groups;
    const float* const x = p.x + t0 * w.columns;
    const __m512 scale = _mm512_set1_ps(w.scale[o]), zero = _mm512_set1_ps(w.zero[o]);
    const int64_t sixteens = w.group >= w.columns ? INT64_MAX : w.group / 16;  // of columns in a group
    int64_t at = (w.offsets ? static_cast<int64_t>(w.offsets[o]) : o * w.columns) * w.rest, until = sixteens;
    __m512 sum[T][2];
    for (int t = 0; t < T; ++t) sum[t][0] = sum[t][1] = _mm512_setzero_ps();
    __m512 lower = _mm512_set1_ps(*low), upper = _mm512_set1_ps(*high);
    const auto columns = [&]<bool whole>(int64_t i) __attribute__((always_inline)) {
        const int64_t count = whole ? 64 : w.columns - i;
        const uint64_t valid = count < 64 ? (uint64_t{1} << count) - 1 : ~uint64_t{0}, set = bits_from(plane, stride, i);
        const uint64_t salient = !w.codes ? 0 : mask ? ~bits_from(mask, stride, i) & valid : valid;
        __m512i found = _mm512_setzero_si512();
        if (salient) {
            found = codes(at, salient, set);
            at += __builtin_popcountll(salient) * w.rest;
        }
        const auto sixteen = [&]<int q>() __attribute__((always_inline)) {
            const __mmask16 there = static_cast<__mmask16>(valid >> 16 * q);
            const __m512 code = sixteen_floats<q>(found);
            __m512 weight = _mm512_mask_blend_ps(static_cast<__mmask16>(set >> 16 * q), lower, upper);
            weight = _mm512_mask_mul_ps(weight, static_cast<__mmask16>(salient >> 16 * q), scale, _mm512_sub_ps(code, zero));
            for (int t = 0; t < T; ++t) {
                const float* const from = x + t * w.columns + i + 16 * q;
                sum[t][q % 2] = whole ? _mm512_fmadd_ps(weight, _mm512_loadu_ps(from), sum[t][q % 2])
                                      : _mm512_mask3_fmadd_ps(weight, _mm512_maskz_loadu_ps(there, from), sum[t][q % 2], there);
            }
            if (--until == 0 && i + 16 * (q + 1) < w.columns) {
                until = sixteens;
                lower = _mm512_set1_ps(*++low);
                upper = _mm512_set1_ps(*++high);
            }
        };
        sixteen.template operator()<0>();
        sixteen.template operator()<1>();
        sixteen.template operator()<2>();
        sixteen.template operator()<3>();
    };
    int64_t i = 0;
    for (; i + 64 <= w.columns; i += 64) columns.template operator()<true>(i);
    if (i < w.columns) columns.template operator()<false>(i);
    for (int t = 0; t < T; ++t) p.y[(t0 + t) * w.rows + o] = _mm512_reduce_add_ps(_mm512_add_ps(sum[t][0], sum[t][1]));
}

void rows(const PartialMatmul& p, int64_t first, int64_t last, float*) {
    const Codes codes(p.weights);
    for (int64_t o = first; o < last; ++o) {
        int64_t t = 0;
        for (; t + 8 <= p.tokens; t += 8) row_of_tokens<8>(p, codes, o, t);
        for (; t + 4 <= p.tokens; t += 4) row_of_tokens<4>(p, codes, o, t);
        for (; t + 2 <= p.tokens; t += 2) row_of_tokens<2>(p, codes, o, t);
        for (; t < p.tokens; ++t) row_of_tokens<1>(p, codes, o, t);
    }
}

}  // namespace

namespace dither {

PartialRows partial_rows_avx512vbmi2(const PartialProblem& w) { return w.group >= w.columns || w.group % 16 == 0 ? rows : nullptr; }

}  // namespace dither
