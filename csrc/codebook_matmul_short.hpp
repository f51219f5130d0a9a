// Entries of four and eight floats: shorter than a register. For one token they take part of it; for several, an entry is repeated (which a load does on
// the way) and each copy meets a token of its own. Include only in files compiled for AVX2 and FMA, or more.
#pragma once

#include <immintrin.h>

namespace {

struct Four {
    static constexpr int lanes = 4, tokens = 1;
    __m128 v;
    static Four zero() { return {_mm_setzero_ps()}; }
    static Four entry(const float* p) { return {_mm_loadu_ps(p)}; }
    static Four inputs(const float* x) { return {_mm_set1_ps(*x)}; }
    void store(float* p) const { _mm_storeu_ps(p, v); }
    friend Four operator+(Four a, Four b) { return {_mm_add_ps(a.v, b.v)}; }
    static Four fmadd(Four a, Four b, Four c) { return {_mm_fmadd_ps(a.v, b.v, c.v)}; }
};

template <int count>  // of tokens: 1, or 2 for entries of four
struct Eight {
    static constexpr int lanes = 8 / count, tokens = count;
    __m256 v;
    static Eight zero() { return {_mm256_setzero_ps()}; }
    static Eight entry(const float* p) {
        if constexpr (count == 2) return {_mm256_broadcast_ps(reinterpret_cast<const __m128*>(p))};
        else return {_mm256_loadu_ps(p)};
    }
    static Eight inputs(const float* x) {
        if constexpr (count == 2) return {_mm256_set_m128(_mm_set1_ps(x[1]), _mm_set1_ps(x[0]))};
        else return {_mm256_set1_ps(*x)};
    }
    void store(float* p) const { _mm256_storeu_ps(p, v); }
    friend Eight operator+(Eight a, Eight b) { return {_mm256_add_ps(a.v, b.v)}; }
    static Eight fmadd(Eight a, Eight b, Eight c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
};

#ifdef __AVX512F__
template <int count>  // of tokens: 2 for entries of eight, 4 for entries of four
struct Sixteen {
    static constexpr int lanes = 16 / count, tokens = count;
    __m512 v;
    static Sixteen zero() { return {_mm512_setzero_ps()}; }
    static Sixteen entry(const float* p) {
        if constexpr (count == 4) return {_mm512_broadcast_f32x4(_mm_loadu_ps(p))};
        else return {_mm512_broadcast_f32x8(_mm256_loadu_ps(p))};
    }
    static Sixteen inputs(const float* x) {
        if constexpr (count == 4) {
            const __m512i each = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
            return {_mm512_permutexvar_ps(each, _mm512_castps128_ps512(_mm_loadu_ps(x)))};
        } else {
            return {_mm512_insertf32x8(_mm512_set1_ps(x[0]), _mm256_set1_ps(x[1]), 1)};
        }
    }
    void store(float* p) const { _mm512_storeu_ps(p, v); }
    friend Sixteen operator+(Sixteen a, Sixteen b) { return {_mm512_add_ps(a.v, b.v)}; }
    static Sixteen fmadd(Sixteen a, Sixteen b, Sixteen c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
};
#endif

}  // namespace
