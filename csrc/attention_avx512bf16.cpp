// vdpbf16ps: a lane holds two bfloat16, and the instruction adds both products to a float32.
#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstring>

#include "attention.hpp"

namespace {

using dither::AttentionLayout;
using dither::AttentionProblem;

constexpr int64_t M = dither::attention_tile, N = 4, L = 16;  // 24 sums, 4 panels and a left operand of 32 registers

uint32_t two(const uint16_t* p) {  // two bfloat16 that lie next to each other, at any address
    uint32_t pair;
    std::memcpy(&pair, p, 4);
    return pair;
}

__m512bh as_pairs(__m512i lanes) { return reinterpret_cast<__m512bh>(lanes); }

void pack(const AttentionProblem& p, const AttentionLayout& layout, int64_t batch, int64_t group, uint32_t* keys, uint32_t* values) {
    const uint16_t* const k = p.k + batch * p.k_stride.batch + group * p.k_stride.head;
    const int64_t features = p.width / 2;
    for (int64_t panel = 0; p.paneled && panel < layout.key_panels; ++panel)
        for (int64_t i = 0; i < features; ++i) {
            const auto feature = [&](int64_t f) {
                return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(k + panel * p.k_stride.token + f * L)));
            };
            _mm512_storeu_si512(keys + (panel * features + i) * L, _mm512_or_si512(feature(2 * i), _mm512_slli_epi32(feature(2 * i + 1), 16)));
        }
    for (int64_t t = 0; !p.paneled && t < layout.key_panels * L; ++t) {
        uint32_t* const to = keys + t / L * features * L + t % L;
        const uint16_t* const from = k + t * p.k_stride.token;
        for (int64_t i = 0; i < features; ++i) to[i * L] = t < p.keys() ? two(from + 2 * i) : 0;
    }
    const uint16_t* const v = p.v + batch * p.v_stride.batch + group * p.v_stride.head;
    for (int64_t panel = 0; panel < layout.value_panels; ++panel) {
        const int64_t left = p.value_width - panel * L;
        const __mmask16 mask = left >= L ? 0xffff : static_cast<__mmask16>((1u << left) - 1);
        for (int64_t t = 0; t < layout.key_pairs; ++t, values += L) {
            __m512i lanes = _mm512_setzero_si512();
            const uint16_t* const from = v + panel * L + 2 * t * p.v_stride.token;
            if (2 * t < p.keys()) lanes = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, from));
            if (2 * t + 1 < p.keys())
                lanes = _mm512_or_si512(lanes, _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, from + p.v_stride.token)), 16));
            _mm512_storeu_si512(values, lanes);
        }
    }
}

// sum[m][n] = sum_k left[m][k] right[n][k], k over pairs; right: panels `panel_stride` lanes apart
template <int64_t panels>
void product(const uint16_t* const (&left)[M], const uint32_t* right, int64_t panel_stride, int64_t pairs, __m512 (&sum)[M][N]) {
    __m512 own[M][panels];  // in registers: `sum` itself lies in memory
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
        for (int n = 0; n < panels; ++n) own[m][n] = _mm512_setzero_ps();
    for (int64_t k = 0; k < pairs; ++k, right += L) {
        __m512bh r[panels];
#pragma GCC unroll 8
        for (int n = 0; n < panels; ++n) r[n] = as_pairs(_mm512_loadu_si512(right + n * panel_stride));
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) {
            const __m512bh l = as_pairs(_mm512_set1_epi32(static_cast<int>(two(left[m] + 2 * k))));
#pragma GCC unroll 8
            for (int n = 0; n < panels; ++n) own[m][n] = _mm512_dpbf16_ps(own[m][n], l, r[n]);
        }
    }
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
        for (int n = 0; n < panels; ++n) sum[m][n] = own[m][n];
}

void multiply(const uint16_t* const (&left)[M], const uint32_t* right, int64_t panel_stride, int64_t pairs, int64_t panels, __m512 (&sum)[M][N]) {
    switch (panels) {
        case 1: return product<1>(left, right, panel_stride, pairs, sum);
        case 2: return product<2>(left, right, panel_stride, pairs, sum);
        case 3: return product<3>(left, right, panel_stride, pairs, sum);
        default: return product<4>(left, right, panel_stride, pairs, sum);
    }
}

// 2^x for x <= 0 with a relative error below 3e-7, far below what rounding to bfloat16 adds; NaN for NaN. Polynomial: Taylor's of 2^f.
__m512 power_of_two(__m512 x) {
    const __m512 n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m512 f = _mm512_sub_ps(x, n);
    __m512 y = _mm512_set1_ps(1.5403530e-4f);
    y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(1.3333558e-3f));
    y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(9.6181291e-3f));
    y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(5.5504109e-2f));
    y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(2.4022651e-1f));
    y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(6.9314718e-1f));
    y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(y, n);
}

// Logits of one row to bfloat16 2^(factor l - max), zero from `seen` to `width`; returns their sum's inverse.
float exponentials(const float* logits, uint16_t* to, int64_t seen, int64_t width, float factor) {
    const __m512 c = _mm512_set1_ps(factor), nothing = _mm512_set1_ps(-INFINITY);
    const int64_t whole = seen / L * L;
    const __mmask16 rest = static_cast<__mmask16>((1u << (seen - whole)) - 1);
    const auto scaled = [&](int64_t j) { return _mm512_mul_ps(_mm512_loadu_ps(logits + j), c); };  // rounded alike both times: none exceeds the greatest
    __m512 greatest[2] = {rest ? _mm512_mask_mov_ps(nothing, rest, scaled(whole)) : nothing, nothing};
    for (int64_t j = 0; j < whole; j += L) greatest[j / L % 2] = _mm512_max_ps(scaled(j), greatest[j / L % 2]);
    const __m512 top = _mm512_set1_ps(_mm512_reduce_max_ps(_mm512_max_ps(greatest[0], greatest[1])));
    __m512 sum = _mm512_setzero_ps();
    const auto sixteen = [&](int64_t j, __mmask16 mask) __attribute__((always_inline)) {
        const __m512 e = _mm512_maskz_mov_ps(mask, power_of_two(_mm512_sub_ps(scaled(j), top)));
        sum = _mm512_add_ps(sum, e);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + j), reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(e)));
    };
    for (int64_t j = 0; j < whole; j += L) sixteen(j, 0xffff);
    if (rest) sixteen(whole, rest);
    if (const int64_t j = whole + (rest ? L : 0); j < width) std::memset(to + j, 0, sizeof(uint16_t) * (width - j));
    return 1.0f / _mm512_reduce_add_ps(sum);
}

void attend(const AttentionProblem& p, const AttentionLayout& layout, int64_t batch, int64_t head, int64_t first, int64_t rows,
            const uint32_t* keys, const uint32_t* values, float* logits, uint16_t* probabilities) {
    const uint16_t* const q = p.q + batch * p.q_stride.batch + head * p.q_stride.head;
    const float factor = p.scale * 1.44269504f;  // e^x = 2^(x log2 e)
    for (int64_t r = 0; r < rows; r += M) {
        const int64_t here = std::min(M, rows - r), panels = (p.before + first + r + here + L - 1) / L;  // of keys that the last row sees
        const uint16_t* left[M];
        for (int64_t m = 0; m < M; ++m) left[m] = q + (first + r + std::min(m, here - 1)) * p.q_stride.token;
        __m512 sum[M][N];
        for (int64_t panel = 0; panel < panels; panel += N) {
            const int64_t some = std::min(N, panels - panel), features = p.width / 2;
            multiply(left, keys + panel * features * L, features * L, features, some, sum);
            for (int64_t m = 0; m < here; ++m)
                for (int64_t n = 0; n < some; ++n) _mm512_storeu_ps(logits + m * layout.stride + (panel + n) * L, sum[m][n]);
        }
        float inverse[M];
        for (int64_t m = 0; m < here; ++m) {
            uint16_t* const to = probabilities + m * layout.stride;
            inverse[m] = exponentials(logits + m * layout.stride, to, p.before + first + r + m + 1, panels * L, factor);
            left[m] = to;
        }
        for (int64_t m = here; m < M; ++m) left[m] = probabilities;

        for (int64_t panel = 0; panel < layout.value_panels; panel += N) {
            const int64_t some = std::min(N, layout.value_panels - panel);
            multiply(left, values + panel * layout.key_pairs * L, layout.key_pairs * L, panels * (L / 2), some, sum);
            for (int64_t m = 0; m < here; ++m)
                for (int64_t n = 0; n < some; ++n) {
                    const int64_t column = (panel + n) * L, features = p.value_width - column;
                    const __mmask16 mask = features >= L ? 0xffff : static_cast<__mmask16>((1u << features) - 1);
                    const __m512 o = _mm512_mul_ps(sum[m][n], _mm512_set1_ps(inverse[m]));
                    uint16_t* const to = p.out + batch * p.out_stride.batch + head * p.out_stride.head + (first + r + m) * p.out_stride.token + column;
                    _mm256_mask_storeu_epi16(to, mask, reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(o)));
                }
        }
    }
}

}  // namespace

namespace dither {

AttentionKernel attention_kernel_avx512bf16() { return {pack, attend}; }

}  // namespace dither
