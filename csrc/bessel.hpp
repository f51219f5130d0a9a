// log I_v(x) or log K_v(x), and the ratio I_{v+1} / I_v or K_{v-1} / K_v, of n pairs (v, x); equations in dither/kernels/bessel_reference.py.
// A chunk of pairs is classified, sorted by region so that no vector holds two expressions, and every region runs in whole vectors. What a pair
// gives depends on nothing but the pair.
#pragma once

#include <cstdint>

#include "cpu.hpp"

namespace dither {

// as REGIONS in dither/kernels/bessel_shapes.py, with the terms and nodes that stand there
enum class BesselRegion : uint8_t { mu_3, mu_20, u_4, u_6, u_7, u_9, u_13, u_20, small_1, small_3, small_8, small_30, limit, count };

inline constexpr int64_t bessel_chunk = 4096;  // pairs that are sorted together
inline constexpr int64_t bessel_lanes = 8;     // regions are padded to this
inline constexpr int debye_terms = 20, gamma_terms = 24;  // TERMS and GAMMA_TERMS there

struct BesselTables {
    const double* u;      // [20, 21]
    const double* w;      // [20, 21]
    const double* gamma;  // [24]
    const double* logs;   // [3, 33]
    const double* nodes;  // [41, 2]
};

struct BesselProblem {
    int64_t n;
    bool second;       // K
    const double* v;   // [n]
    const double* x;   // [n]
    const uint8_t* regions;  // [n] or null: classify
    BesselTables tables;
    double* value;  // [n]
    double* ratio;  // [n] or null
};

struct BesselKernel {
    void (*classify)(const double* v, const double* x, uint8_t* regions, int64_t n);
    // the elementary functions that the regions use, for tests: exp, expm1, log, log1p as 0 .. 3; n a multiple of bessel_lanes
    void (*elementary)(int which, const double* logs, const double* x, double* y, int64_t n);
    // one region but `limit`; n a multiple of bessel_lanes; ratio may be null
    void (*run)(BesselRegion, bool second, const BesselTables&, const double* v, const double* x, double* value, double* ratio, int64_t n);
};

BesselKernel bessel_kernel_scalar();
#ifdef DITHER_X86
BesselKernel bessel_kernel_avx2();
BesselKernel bessel_kernel_avx512();
#endif

BesselKernel bessel_kernel(Isa isa);
void log_bessel(const BesselProblem&, Isa isa, int threads);

}  // namespace dither
