// softmax, log-softmax and log-sum-exp of rows x [R, N], and the gradient of softmax.
//     two_pass    sum of extended numbers m 2^n (ext_exp.hpp); y = m / S 2^(n - E)      2 N read, N written
//     recompute   maximum; sum of e^(x - max); y = e^(x - max) / sum                    3 N read, N written
//     reload      maximum; y = e^(x - max) and its sum; y = y / sum                     3 N read, 2 N written
//     online      sum of e^(x - max) with a maximum that grows; y = e^(x - max) / sum   2 N read, N written
// Dukhan and Ablavatski, The Two-Pass Softmax Algorithm, 2020, arXiv 2001.04438; online: Milakov and Gimelshein, 2018, arXiv 1805.02867.
// A row is cut into chunks of fixed size, whose sums are merged in their order in double: the number of threads changes no bit.
#pragma once

#include <cstdint>

#include "cpu.hpp"

namespace dither {

inline constexpr int64_t softmax_chunk = 65536;  // elements that one thread works on

enum class Number { float32, float64, bfloat16, float16 };
enum class SoftmaxAlgorithm { two_pass, recompute, reload, online };
enum class SoftmaxOutput { softmax, log_softmax, logsumexp };

struct SoftmaxProblem {
    int64_t rows, columns;  // R, N
    Number type;            // of x and y; arithmetic is float32, of float64 rows float64
    SoftmaxAlgorithm algorithm;
    SoftmaxOutput output;
    bool stream;    // the last pass writes past the caches; not with reload
    const void* x;  // [R, N]
    void* y;        // [R, N], or [R] float32 (float64) of logsumexp; may be x
};

struct SoftmaxGradient {
    int64_t rows, columns;
    Number type;
    const void *y, *g;  // [R, N] the softmax and the gradient of it
    void* dx;           // [R, N] y (g - <g, y>); may be y or g
};

struct Power {
    double mantissa, exponent;  // mantissa 2^exponent
};

struct Peak {
    double sum, greatest;  // sum of e^(x - greatest)
};

// The passes over elements [begin, begin + count) of a row
struct SoftmaxPasses {
    int64_t piece;  // elements whose sum is made in the row's own precision, so that roundings to one side do not add up; further ones in double
    Power (*extended_sum)(const void* x, int64_t begin, int64_t count);
    double (*greatest)(const void* x, int64_t begin, int64_t count);  // passes over NaN
    double (*sum)(const void* x, int64_t begin, int64_t count, double greatest);
    double (*sum_kept)(const void* x, int64_t begin, int64_t count, double greatest, void* e);  // e: float32 (float64)
    Peak (*online_sum)(const void* x, int64_t begin, int64_t count);
    void (*divide_extended)(const void* x, int64_t begin, int64_t count, Power inverse, void* y, bool stream);
    void (*divide)(const void* x, int64_t begin, int64_t count, double greatest, double inverse, void* y, bool stream);
    void (*divide_kept)(const void* e, int64_t begin, int64_t count, double inverse, void* y);
    void (*subtract)(const void* x, int64_t begin, int64_t count, double high, double low, void* y, bool stream);  // (x - high) - low, at most 0
    bool (*any_nan)(const void* x, int64_t begin, int64_t count);
    double (*dot)(const void* y, const void* g, int64_t begin, int64_t count);
    void (*gradient)(const void* y, const void* g, int64_t begin, int64_t count, double dot, void* dx);
};

const SoftmaxPasses& softmax_passes_scalar(Number);
#ifdef DITHER_X86
const SoftmaxPasses& softmax_passes_avx2(Number);
const SoftmaxPasses& softmax_passes_avx512(Number);
#endif

void softmax(const SoftmaxProblem&, Isa isa, int threads);
void softmax_gradient(const SoftmaxGradient&, Isa isa, int threads);

}  // namespace dither
