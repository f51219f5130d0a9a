// Rows of float32, float64, bfloat16 and float16 to vectors and back: whole vectors, the first `n` lanes of one, and stores past the caches.
// Narrow types are rounded half to even; NaN stays NaN. Include only in files compiled for AVX-512.
#pragma once

#include "simd_avx512.hpp"
#include "storage.hpp"

namespace {

using dither::BFloat16;
using dither::Float16;

inline __mmask16 first16(int64_t n) { return static_cast<__mmask16>((1u << n) - 1); }
inline __mmask8 first8(int64_t n) { return static_cast<__mmask8>((1u << n) - 1); }

inline __m512 widened(__m256i bits, const BFloat16*) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16)); }
inline __m512 widened(__m256i bits, const Float16*) { return _mm512_cvtph_ps(bits); }

inline __m256i narrowed(__m512 v, const BFloat16*) {
    const __m512i bits = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
    const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    return _mm512_cvtepi32_epi16(_mm512_mask_blend_epi32(nan, rounded, _mm512_set1_epi32(0x7fc0)));
}
inline __m256i narrowed(__m512 v, const Float16*) { return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

inline F32 load(const float* p) { return F32::load(p); }
inline F64 load(const double* p) { return F64::load(p); }
template <class Narrow>
F32 load(const Narrow* p) { return {widened(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), p)}; }

// the other lanes become `fill`
inline F32 load_first(const float* p, int64_t n, float fill) { return {_mm512_mask_loadu_ps(_mm512_set1_ps(fill), first16(n), p)}; }
inline F64 load_first(const double* p, int64_t n, double fill) { return {_mm512_mask_loadu_pd(_mm512_set1_pd(fill), first8(n), p)}; }
template <class Narrow>
F32 load_first(const Narrow* p, int64_t n, float fill) {
    const __m512 some = widened(_mm256_maskz_loadu_epi16(first16(n), p), p);
    return {_mm512_mask_blend_ps(first16(n), _mm512_set1_ps(fill), some)};
}

inline void store(float* p, F32 x) { x.store(p); }
inline void store(double* p, F64 x) { x.store(p); }
template <class Narrow>
void store(Narrow* p, F32 x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrowed(x.v, p)); }

inline void store_first(float* p, F32 x, int64_t n) { _mm512_mask_storeu_ps(p, first16(n), x.v); }
inline void store_first(double* p, F64 x, int64_t n) { _mm512_mask_storeu_pd(p, first8(n), x.v); }
template <class Narrow>
void store_first(Narrow* p, F32 x, int64_t n) { _mm256_mask_storeu_epi16(p, first16(n), narrowed(x.v, p)); }

// p is aligned to the bytes written
inline void stream(float* p, F32 x) { _mm512_stream_ps(p, x.v); }
inline void stream(double* p, F64 x) { _mm512_stream_pd(p, x.v); }
template <class Narrow>
void stream(Narrow* p, F32 x) { _mm256_stream_si256(reinterpret_cast<__m256i*>(p), narrowed(x.v, p)); }
inline void streamed() { _mm_sfence(); }  // after the last of them, before another thread reads

}  // namespace
