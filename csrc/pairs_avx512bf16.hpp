// vdpbf16ps: a lane holds two bfloat16, and the instruction adds both products to a float32. Include only in files compiled for AVX512_BF16.
#pragma once

#include <immintrin.h>

namespace {

struct Bf16Pairs {
    static constexpr int lanes = 16;
    __m512 v;  // the bits of 16 pairs, or 16 float32 sums

    static Bf16Pairs load(const float* p) { return {_mm512_loadu_ps(p)}; }
    static Bf16Pairs set1(float pair) { return {_mm512_set1_ps(pair)}; }
    void store(float* p) const { _mm512_storeu_ps(p, v); }
    friend Bf16Pairs operator+(Bf16Pairs a, Bf16Pairs b) { return {_mm512_add_ps(a.v, b.v)}; }  // of sums
    static Bf16Pairs fmadd(Bf16Pairs a, Bf16Pairs b, Bf16Pairs sum) {
        return {_mm512_dpbf16_ps(sum.v, reinterpret_cast<__m512bh>(a.v), reinterpret_cast<__m512bh>(b.v))};
    }
};

}  // namespace
