// Rows of float32, float64, bfloat16 and float16 to vectors and back: whole vectors, the first `n` lanes of one, and stores past the caches.
// Narrow types are rounded half to even; NaN stays NaN. Include only in files compiled for AVX2 and F16C.
#pragma once

#include "simd_avx2.hpp"
#include "storage.hpp"

namespace {

using dither::BFloat16;
using dither::Float16;

inline __m256i first8(int64_t n) { return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7)); }
inline __m256i first4(int64_t n) { return _mm256_cmpgt_epi64(_mm256_set1_epi64x(n), _mm256_setr_epi64x(0, 1, 2, 3)); }

inline __m256 widened(__m128i bits, const BFloat16*) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16)); }
inline __m256 widened(__m128i bits, const Float16*) { return _mm256_cvtph_ps(bits); }

inline __m128i narrowed(__m256 v, const BFloat16*) {
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    const __m256i all = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc0), nan);
    return _mm_packus_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1));
}
inline __m128i narrowed(__m256 v, const Float16*) { return _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

inline F32 load(const float* p) { return F32::load(p); }
inline F64 load(const double* p) { return F64::load(p); }
template <class Narrow>
F32 load(const Narrow* p) { return {widened(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)), p)}; }

// the other lanes become `fill`
inline F32 load_first(const float* p, int64_t n, float fill) {
    const __m256i some = first8(n);
    return {_mm256_blendv_ps(_mm256_set1_ps(fill), _mm256_maskload_ps(p, some), _mm256_castsi256_ps(some))};
}
inline F64 load_first(const double* p, int64_t n, double fill) {
    const __m256i some = first4(n);
    return {_mm256_blendv_pd(_mm256_set1_pd(fill), _mm256_maskload_pd(p, some), _mm256_castsi256_pd(some))};
}
template <class Narrow>
F32 load_first(const Narrow* p, int64_t n, float fill) {
    Narrow copy[8] = {};
    std::memcpy(copy, p, n * sizeof(Narrow));
    return {_mm256_blendv_ps(_mm256_set1_ps(fill), load(copy).v, _mm256_castsi256_ps(first8(n)))};
}

inline void store(float* p, F32 x) { x.store(p); }
inline void store(double* p, F64 x) { x.store(p); }
template <class Narrow>
void store(Narrow* p, F32 x) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrowed(x.v, p)); }

inline void store_first(float* p, F32 x, int64_t n) { _mm256_maskstore_ps(p, first8(n), x.v); }
inline void store_first(double* p, F64 x, int64_t n) { _mm256_maskstore_pd(p, first4(n), x.v); }
template <class Narrow>
void store_first(Narrow* p, F32 x, int64_t n) {
    Narrow copy[8];
    store(copy, x);
    std::memcpy(p, copy, n * sizeof(Narrow));
}

// p is aligned to the bytes written
inline void stream(float* p, F32 x) { _mm256_stream_ps(p, x.v); }
inline void stream(double* p, F64 x) { _mm256_stream_pd(p, x.v); }
template <class Narrow>
void stream(Narrow* p, F32 x) { _mm_stream_si128(reinterpret_cast<__m128i*>(p), narrowed(x.v, p)); }
inline void streamed() { _mm_sfence(); }  // after the last of them, before another thread reads

}  // namespace
