// Scales and zero points of sixteen outputs and sixteen groups, turned so that outputs lie side by side. Numbers of 16 bits, and bytes, are turned
// before they are widened: a shuffle of two vectors swaps a bit of which vector an element is in with a bit of its place there, so three rounds of eight
// shuffles turn 16 x 16 numbers of 16 bits, and two of four turn as many bytes. Include only in files compiled for AVX512_VBMI.
#pragma once

#include "int8_lanes_avx512.hpp"

#include "int8_grid.hpp"

namespace {

// Of groups first .. first + 16 and outputs o .. o + 16; zeros behind the last.
struct SixteenGroups {
    alignas(64) float scales[16][16];  // [group][output]
    alignas(64) uint8_t zeros[16][16];
};

// Where lanes of a turned vector come from. `from`: for each bit of a lane's number, least first, the bit of the number of the lane it is taken from;
// `vector` stands for which of the two vectors.
template <int bits, class T>
struct Turn {
    static constexpr int lanes = 1 << bits;
    alignas(64) T index[2][lanes];

    constexpr Turn(const int (&from)[bits], int chosen) : index{} {
        for (int which = 0; which < 2; ++which)
            for (int lane = 0; lane < lanes; ++lane) {
                int at = which << chosen;
                for (int b = 0; b < bits; ++b) at |= (lane >> b & 1) << from[b];
                index[which][lane] = static_cast<T>(at);
            }
    }
    __m512i operator[](int which) const { return _mm512_load_si512(index[which]); }
};

// Numbers of 16 bits: vector i holds outputs i and i + 8. Bit 5 says which vector of a pair.
inline constexpr Turn<5, uint16_t> words_first({0, 5, 2, 3, 4}, 1), words_second({0, 1, 5, 3, 4}, 2), words_third({1, 2, 5, 4, 0}, 3);
// Bytes: vector i holds outputs 4i .. 4i + 3. Bit 6 says which vector of a pair.
inline constexpr Turn<6, uint8_t> bytes_first({0, 1, 6, 3, 4, 5}, 2), bytes_second({4, 5, 2, 6, 0, 1}, 3);

// vectors whose numbers differ in bit `b` only are pairs
template <int count, class T, int bits>
inline void turn(__m512i (&v)[count], int b, const Turn<bits, T>& how) {
    const __m512i low = how[0], high = how[1];
#pragma GCC unroll 8
    for (int i = 0; i < count; ++i) {
        if (i >> b & 1) continue;
        const __m512i one = v[i], two = v[i | 1 << b];
        if constexpr (sizeof(T) == 2) {
            v[i] = _mm512_permutex2var_epi16(one, low, two);
            v[i | 1 << b] = _mm512_permutex2var_epi16(one, high, two);
        } else {
            v[i] = _mm512_permutex2var_epi8(one, low, two);
            v[i | 1 << b] = _mm512_permutex2var_epi8(one, high, two);
        }
    }
}

template <class Narrow>
void scales_at(const dither::Int8Matmul& p, const Narrow* scale, int64_t o, int64_t first, SixteenGroups& to) {
    const int64_t n = p.groups - first < 16 ? p.groups - first : 16;
    const auto row = [&](int64_t r) {
        return o + r < p.rows ? _mm256_maskz_loadu_epi16(first16(n), scale + (o + r) * p.groups + first) : _mm256_setzero_si256();
    };
    __m512i v[8];
    for (int i = 0; i < 8; ++i) v[i] = _mm512_inserti64x4(_mm512_castsi256_si512(row(i)), row(i + 8), 1);
    turn(v, 0, words_first);
    turn(v, 1, words_second);
    turn(v, 2, words_third);
    for (int i = 0; 2 * i < n; ++i) {
        _mm512_store_ps(to.scales[2 * i], widened(_mm512_castsi512_si256(v[i]), scale));
        _mm512_store_ps(to.scales[2 * i + 1], widened(_mm512_extracti64x4_epi64(v[i], 1), scale));
    }
}

inline void scales_at(const dither::Int8Matmul& p, const float* scale, int64_t o, int64_t first, SixteenGroups& to) {
    const int64_t n = p.groups - first < 16 ? p.groups - first : 16;
    Int rows[16];
    for (int64_t r = 0; r < 16; ++r) rows[r] = o + r < p.rows ? Int::bits(load_first(scale + (o + r) * p.groups + first, n, 0.0f)) : Int::zero();
    transpose(rows);
    for (int k = 0; k < 16; ++k) rows[k].store(to.scales[k]);
}

inline void zeros_at(const dither::Int8Matmul& p, int64_t o, int64_t first, SixteenGroups& to) {
    __m512i v[4];
    if (p.zero) {
        const auto row = [&](int64_t r) {
            return o + r < p.rows ? _mm_maskz_loadu_epi8(first16(p.groups - first < 16 ? p.groups - first : 16), p.zero + (o + r) * p.groups + first)
                                  : _mm_setzero_si128();
        };
        for (int i = 0; i < 4; ++i) {
            v[i] = _mm512_castsi128_si512(row(4 * i));
            v[i] = _mm512_inserti32x4(v[i], row(4 * i + 1), 1);
            v[i] = _mm512_inserti32x4(v[i], row(4 * i + 2), 2);
            v[i] = _mm512_inserti32x4(v[i], row(4 * i + 3), 3);
        }
        turn(v, 0, bytes_first);
        turn(v, 1, bytes_second);
    } else {
        for (__m512i& each : v) each = _mm512_set1_epi8(static_cast<char>(p.middle));
    }
    for (int i = 0; i < 4; ++i) _mm512_store_si512(to.zeros[4 * i], v[i]);
}

inline void grid_at(const dither::Int8Matmul& p, int64_t o, int64_t first, SixteenGroups& to) {
    switch (p.scale_type) {
        case dither::ScaleStorage::float32: scales_at(p, static_cast<const float*>(p.scale), o, first, to); break;
        case dither::ScaleStorage::float16: scales_at(p, static_cast<const Float16*>(p.scale), o, first, to); break;
        case dither::ScaleStorage::bfloat16: scales_at(p, static_cast<const BFloat16*>(p.scale), o, first, to); break;
        default: break;  // no scales of a byte: dither/kernels/int8_matmul.py refuses them
    }
    zeros_at(p, o, first, to);
}

}  // namespace
