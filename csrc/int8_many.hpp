// Any number of rows of int8_matmul.hpp, written once for every instruction set. The codes of a panel of outputs are unpacked to bytes, four columns of
// every output side by side: [group][four columns][output][4], as many groups as stay in the second cache. Then all tokens pass by, K::tokens at a
// time on K::vectors vectors of outputs, whose int32 sums of a group stay in registers.
#pragma once

#include "int8_grid.hpp"
#include "packing.hpp"

namespace {

inline constexpr int64_t panel_bytes = 256 << 10;

struct Panel {
    const uint8_t* codes;   // from the first group on
    const float* scales;    // [vector][groups, rounded up][lanes]
    const int32_t* zeros;   // likewise
    const int32_t* pointed; // [group][vector][lanes]: sums of (code - zero); paired: -zero and in the upper half what takes `point` off
    float* partial;         // [token][vector][lanes]: the sums over earlier groups, where there are some
    int64_t output, first, last, grid;  // groups; numbers in a vector's grid
};

template <class K>
int64_t groups_at_a_time(const dither::Int8Matmul& p) {
    const int64_t fit = panel_bytes / (K::vectors * 4 * K::Int::lanes) * 4 / p.padded;
    return fit < 1 ? 1 : fit < p.groups ? fit : p.groups;
}

template <class K>
std::size_t many_bytes(const dither::Int8Matmul& p) {
    constexpr int64_t outputs = K::vectors * K::Int::lanes;
    const int64_t groups = groups_at_a_time<K>(p);
    return K::vectors * 8 * grid_size<typename K::Int>(p) + groups * outputs * (p.padded + (p.pointed() || p.paired ? 4 : 0)) +
           (groups < p.groups ? sizeof(float) * p.tokens * outputs : 0);
}

template <class K>
void unpack_panel(const dither::Int8Matmul& p, const typename K::Decoder& decoder, const Panel& panel, uint8_t* to) {
    using Int = typename K::Int;
    constexpr int64_t L = Int::lanes, next = K::vectors * 4 * L;
    const int64_t stride = dither::packed_stride(p.columns, p.bits), fours = p.padded / 4;
    const uint8_t* const end = p.packed + p.rows * stride;
    for (int64_t g = panel.first; g < panel.last; ++g, to += fours * next)
        for (int64_t c = 0; c < K::vectors; ++c) {
            const int64_t bit = g * p.group * p.bits;
            const auto aim = decoder.aim(static_cast<int>(bit % 8));
            for (int64_t k = 0; k < fours; k += L) {
                Int rows[L];
                for (int64_t r = 0; r < L; ++r) {
                    const int64_t o = panel.output + c * L + r;
                    uint8_t tail[K::Decoder::reach];
                    const uint8_t* const from = p.packed + (o < p.rows ? o : p.rows - 1) * stride + bit / 8 + k * p.bits / 2;
                    rows[r] = K::bytes(decoder.codes(readable(before(from, end), end, tail), aim));
                }
                transpose(rows);
                for (int64_t l = 0; l < L && k + l < fours; ++l) rows[l].store(to + (k + l) * next + c * 4 * L);
            }
        }
}

// What a group's codes give with M rows of q. The sums are an object of this function, so that they are registers while it loops.
template <class K, int M>
struct Sums {
    typename K::Int of[M][K::vectors];
};

template <class K, int M>
inline Sums<K, M> group_sums(const uint8_t* codes, const int8_t* q, int64_t q_stride, int64_t fours) {
    using Int = typename K::Int;
    constexpr int64_t L = Int::lanes;
    Sums<K, M> sums;
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
        for (int c = 0; c < K::vectors; ++c) sums.of[m][c] = Int::zero();
    for (int64_t k = 0; k < fours; ++k, codes += K::vectors * 4 * L, q += 4) {
        typename K::Code code[K::vectors];
#pragma GCC unroll 8
        for (int c = 0; c < K::vectors; ++c) code[c] = K::code(Int::load(codes + c * 4 * L));
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) {
            int32_t four;
            std::memcpy(&four, q + m * q_stride, 4);
            const typename K::Input input = K::input(Int::set1(four));
#pragma GCC unroll 8
            for (int c = 0; c < K::vectors; ++c) sums.of[m][c] = K::dot(sums.of[m][c], code[c], input);
        }
    }
    return sums;
}

template <class K>
void sums_of_codes(const dither::Int8Matmul& p, const Panel& panel, int32_t* to) {
    using Int = typename K::Int;
    constexpr int64_t L = Int::lanes;
    const uint8_t* codes = panel.codes;
    for (int64_t g = panel.first; g < panel.last; ++g, codes += p.padded * K::vectors * L) {
        Sums<K, 1> sums{};
        if (p.pointed()) sums = group_sums<K, 1>(codes, p.q + p.tokens * p.q_stride + g * p.padded, 0, p.padded / 4);
        for (int c = 0; c < K::vectors; ++c, to += L) {
            const Int zero = Int::load(panel.zeros + c * panel.grid + g * L);
            Int sum = Int::zero();
            if (p.pointed()) sum = sums.of[0][c] - zero * Int::set1(p.sums[p.tokens * p.groups + g]);
            if (p.paired) sum = Int::pair(Int::zero() - zero, Int::zero() - sum);
            sum.store(to);
        }
    }
}

// The sum over the groups before the panel's, of a token and a vector of outputs.
template <class K>
typename K::Float total_before(const Panel& panel, int64_t token, int64_t c) {
    using Float = typename K::Float;
    return panel.first == 0 ? Float::set1(0) : Float::load(panel.partial + (token * K::vectors + c) * Float::lanes);
}

template <class T, class Float>
void put_some(const dither::Int8Matmul& p, int64_t token, int64_t output, Float found) {
    T* const to = static_cast<T*>(p.out) + token * p.out_next + output;
    const int64_t n = p.rows - output;
    if (n >= Float::lanes)
        store(to, found);
    else if (n > 0)
        store_first(to, found, n);
}

template <class K>
__attribute__((always_inline)) inline void put_total(const dither::Int8Matmul& p, const Panel& panel, int64_t token, int64_t c, typename K::Float total) {
    constexpr int64_t L = K::Int::lanes;
    if (panel.last < p.groups) {
        total.store(panel.partial + (token * K::vectors + c) * L);
        return;
    }
    total = total * K::Float::set1(p.steps[token]);
    if (p.bfloat16)
        put_some<dither::BFloat16>(p, token, panel.output + c * L, total);
    else
        put_some<float>(p, token, panel.output + c * L, total);
}

// Of one group and a vector of outputs.
template <class K, bool paired>
struct GroupGrid {
    using Int = typename K::Int;
    using Float = typename K::Float;
    Float scale;
    Int zero, pointed;
    int64_t group;

    GroupGrid(const dither::Int8Matmul& p, const Panel& panel, int64_t g, int64_t c, const int32_t* sums_of_codes)
        : scale(Float::load(panel.scales + c * panel.grid + g * Int::lanes)), zero(Int::load(panel.zeros + c * panel.grid + g * Int::lanes)),
          pointed(paired || p.pointed() ? Int::load(sums_of_codes) : Int::zero()), group(g) {}

    Float add(const dither::Int8Matmul& p, int64_t token, Int products, Float total) const {
        const Int sums = Int::set1(p.sums[token * p.groups + group]);
        if constexpr (paired) return Float::fmadd(scale, Int::add_pairs(products, pointed, sums).floats(), total);
        Int sum = products - zero * sums;
        if (p.pointed()) sum = sum - pointed * Int::set1(p.points[token]);
        return Float::fmadd(scale, sum.floats(), total);
    }
};

// M tokens from t on, on the groups of the panel.
template <class K, int M, bool paired>
void tile(const dither::Int8Matmul& p, const Panel& panel, int64_t t) {
    using Float = typename K::Float;
    constexpr int64_t L = K::Int::lanes;
    constexpr int C = K::vectors;
    Float total[M][C];
    for (int m = 0; m < M; ++m)
        for (int c = 0; c < C; ++c) total[m][c] = total_before<K>(panel, t + m, c);
    const uint8_t* codes = panel.codes;
    const int32_t* pointed = panel.pointed;
    for (int64_t g = panel.first; g < panel.last; ++g, codes += p.padded * C * L, pointed += C * L) {
        const Sums<K, M> sums = group_sums<K, M>(codes, p.q + t * p.q_stride + g * p.padded, p.q_stride, p.padded / 4);
#pragma GCC unroll 8
        for (int c = 0; c < C; ++c) {  // unrolled, so that sums need not go to memory
            const GroupGrid<K, paired> grid(p, panel, g, c, pointed + c * L);
#pragma GCC unroll 8
            for (int m = 0; m < M; ++m) total[m][c] = grid.add(p, t + m, sums.of[m][c], total[m][c]);
        }
    }
    for (int m = 0; m < M; ++m)
        for (int c = 0; c < C; ++c) put_total<K>(p, panel, t + m, c, total[m][c]);
}

// The last tokens, fewer than M + 1.
template <class K, int M, bool paired>
void last_tile(const dither::Int8Matmul& p, const Panel& panel, int64_t t, int64_t count) {
    if constexpr (M > 0) {
        if (count == M)
            tile<K, M, paired>(p, panel, t);
        else
            last_tile<K, M - 1, paired>(p, panel, t, count);
    }
}

struct NoTiles {  // see int8_tiles.hpp
    static constexpr int depth = 4;  // columns that groups are padded to a multiple of
    template <class K, bool paired>
    static int64_t all(const dither::Int8Matmul&, const Panel&, int64_t t, int64_t) { return t; }
};

template <class K, class Tiles, bool paired>
void all_tokens(const dither::Int8Matmul& p, const Panel& panel, int64_t first, int64_t last) {
    int64_t t = Tiles::template all<K, paired>(p, panel, first, last);
    for (; t + K::tokens <= last; t += K::tokens) tile<K, K::tokens, paired>(p, panel, t);
    last_tile<K, K::tokens - 1, paired>(p, panel, t, last - t);
}

template <class K, class Tiles>
void many(const dither::Int8Matmul& p, int64_t output, int64_t first, int64_t last, char* scratch) {
    using Int = typename K::Int;
    const typename K::Decoder decoder(p.bits, p.group * p.bits % 8 != 0);
    const int64_t grid = grid_size<Int>(p), groups = groups_at_a_time<K>(p);
    float* const scales = reinterpret_cast<float*>(scratch);
    int32_t* const zeros = reinterpret_cast<int32_t*>(scales + K::vectors * grid);
    int32_t* const pointed = zeros + K::vectors * grid;
    float* const partial = reinterpret_cast<float*>(pointed + (p.pointed() || p.paired ? groups * K::vectors * Int::lanes : 0));
    uint8_t* const codes = reinterpret_cast<uint8_t*>(partial + (groups < p.groups ? p.tokens * K::vectors * Int::lanes : 0));
    for (int c = 0; c < K::vectors; ++c) grid_of<Int>(p, output + c * Int::lanes, scales + c * grid, zeros + c * grid);
    for (int64_t g = 0; g < p.groups; g += groups) {
        const Panel panel{codes, scales, zeros, pointed, partial, output, g, g + groups < p.groups ? g + groups : p.groups, grid};
        unpack_panel<K>(p, decoder, panel, codes);
        if (p.pointed() || p.paired) sums_of_codes<K>(p, panel, pointed);
        if (p.paired)
            all_tokens<K, Tiles, true>(p, panel, first, last);
        else
            all_tokens<K, Tiles, false>(p, panel, first, last);
    }
}

}  // namespace
