// Four and eight floats, for vectors of a book that are shorter than a register. Include only in files compiled for AVX2 and FMA, or more.
#pragma once

#include <immintrin.h>

namespace {

struct Four {
    static constexpr int lanes = 4;
    __m128 v;
    static Four load(const float* p) { return {_mm_loadu_ps(p)}; }
    static Four set1(float x) { return {_mm_set1_ps(x)}; }
    void store(float* p) const { _mm_storeu_ps(p, v); }
    friend Four operator+(Four a, Four b) { return {_mm_add_ps(a.v, b.v)}; }
    static Four fmadd(Four a, Four b, Four c) { return {_mm_fmadd_ps(a.v, b.v, c.v)}; }
};

struct Eight {
    static constexpr int lanes = 8;
    __m256 v;
    static Eight load(const float* p) { return {_mm256_loadu_ps(p)}; }
    static Eight set1(float x) { return {_mm256_set1_ps(x)}; }
    void store(float* p) const { _mm256_storeu_ps(p, v); }
    friend Eight operator+(Eight a, Eight b) { return {_mm256_add_ps(a.v, b.v)}; }
    static Eight fmadd(Eight a, Eight b, Eight c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
};

}  // namespace
