// The scales and zero points of `lanes` outputs, one beside the other: [groups, rounded up to lanes][lanes], as the products of int8_matmul.hpp want
// them. Outputs behind the last have zeros.
#pragma once

#include <cstring>

#include "int8_matmul.hpp"

namespace {

// Steps of a last, shorter group may begin behind the weights, where q is zero.
inline const uint8_t* before(const uint8_t* p, const uint8_t* end) { return p < end ? p : end; }

// `lanes` vectors, as rows of a matrix
template <class Int>
void transpose(Int (&r)[Int::lanes]) {
    constexpr int B = Int::blocks;
    Int columns[Int::lanes];
    for (int b = 0; b < B; ++b) Int::transpose_lanes(r + 4 * b);
    for (int l = 0; l < 4; ++l) {
        Int some[B];
        for (int b = 0; b < B; ++b) some[b] = r[4 * b + l];
        Int::transpose_blocks(some);
        for (int b = 0; b < B; ++b) columns[4 * b + l] = some[b];
    }
    for (int l = 0; l < Int::lanes; ++l) r[l] = columns[l];
}

template <class Int>
int64_t grid_size(const dither::Int8Matmul& p) { return (p.groups + Int::lanes - 1) / Int::lanes * Int::lanes * Int::lanes; }

template <class Int, class Scale>
void scales_of(const dither::Int8Matmul& p, const Scale* scale, int64_t o, float* to) {
    constexpr int64_t L = Int::lanes;
    for (int64_t g = 0; g < p.groups; g += L, to += L * L) {
        const int64_t n = p.groups - g;
        Int rows[L];
        for (int64_t r = 0; r < L; ++r) {
            const Scale* const from = scale + (o + r) * p.groups + g;
            rows[r] = o + r >= p.rows ? Int::zero() : Int::bits(n >= L ? load(from) : load_first(from, n, 0.0f));
        }
        transpose(rows);
        for (int64_t k = 0; k < L; ++k) rows[k].store(to + k * L);
    }
}

template <class Int>
void grid_of(const dither::Int8Matmul& p, int64_t o, float* scales, int32_t* zeros) {
    constexpr int64_t L = Int::lanes;
    switch (p.scale_type) {
        case dither::ScaleStorage::float32: scales_of<Int>(p, static_cast<const float*>(p.scale), o, scales); break;
        case dither::ScaleStorage::float16: scales_of<Int>(p, static_cast<const dither::Float16*>(p.scale), o, scales); break;
        case dither::ScaleStorage::bfloat16: scales_of<Int>(p, static_cast<const dither::BFloat16*>(p.scale), o, scales); break;
        default: break;  // no scales of a byte: dither/kernels/int8_matmul.py refuses them
    }
    if (!p.zero) {
        for (int64_t k = 0; k < p.groups; ++k) Int::set1(p.middle).store(zeros + k * L);
        return;
    }
    for (int64_t g = 0; g < p.groups; g += L, zeros += L * L) {
        const int64_t n = p.groups - g < L ? p.groups - g : L;
        Int rows[L];
        for (int64_t r = 0; r < L; ++r) {
            uint8_t some[16] = {};
            if (o + r < p.rows) std::memcpy(some, p.zero + (o + r) * p.groups + g, n);
            rows[r] = Int::widened(some);
        }
        transpose(rows);
        for (int64_t k = 0; k < L; ++k) rows[k].store(zeros + k * L);
    }
}

}  // namespace
