#include "codebook.hpp"

#include <algorithm>
#include <bit>
#include <cstring>
#include <vector>

#include "scratch.hpp"

namespace dither {

namespace {

template <class T>
CodebookTiles<T> choose(Isa isa) {
    switch (isa) {
#ifdef DITHER_X86
        case Isa::avx512: return codebook_tiles_avx512<T>();
        case Isa::avx2: return codebook_tiles_avx2<T>();
#endif
        default: return codebook_tiles_scalar<T>();
    }
}

}  // namespace

template <class T>
void codebook_nearest(const NearestProblem<T>& p, Isa isa, [[maybe_unused]] int threads) {
    const CodebookTiles<T> tiles = choose<T>(isa);
    const int64_t lanes = tiles.lanes;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t tile = 0; tile < (p.count + lanes - 1) / lanes; ++tile)
        tiles.nearest(p, tile * lanes, std::min(lanes, p.count - tile * lanes));
}

template <class T>
void codebook_sweep(const SweepProblem<T>& p, Isa isa, [[maybe_unused]] int threads) {
    const CodebookTiles<T> tiles = choose<T>(isa);
    const int64_t lanes = tiles.lanes;
#pragma omp parallel num_threads(threads)
    {
        const Scratch scratch = allocate(tiles.scratch(p.columns, p.v) * sizeof(T));
#pragma omp for schedule(dynamic)
        for (int64_t tile = 0; tile < (p.rows + lanes - 1) / lanes; ++tile)
            tiles.sweep(p, tile * lanes, std::min(lanes, p.rows - tile * lanes), reinterpret_cast<T*>(scratch.get()));
    }
}

template void codebook_nearest<float>(const NearestProblem<float>&, Isa, int);
template void codebook_nearest<double>(const NearestProblem<double>&, Isa, int);
template void codebook_sweep<float>(const SweepProblem<float>&, Isa, int);
template void codebook_sweep<double>(const SweepProblem<double>&, Isa, int);

namespace {

static_assert(std::endian::native == std::endian::little, "bytes of a word are taken in memory order");

// What is stored of a value: float32 as it is, bfloat16 by the nearest (ties to even; values are finite, and stay so unless they round to inf).
inline float as(float x, float) { return x; }
inline uint16_t as(float x, uint16_t) {
    const uint32_t bits = std::bit_cast<uint32_t>(x);
    return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// Codes of one row of vectors, as offsets into [G, k, v].
void unpack(const DecodeProblem& p, const uint8_t* from, int32_t* main, int32_t* residual) {
    const uint32_t mask = (1u << p.bits) - 1, main_mask = (1u << p.main_bits) - 1;
    const int64_t v = p.v, own = int64_t{1} << p.main_bits, other = int64_t{1} << (p.bits - p.main_bits);
    for (int64_t j = 0; j < p.count; ++j) {
        const int64_t bit = j * p.bits, byte = bit >> 3;
        uint32_t word = 0;
        std::memcpy(&word, from + byte, std::min<int64_t>(4, p.stride - byte));
        const uint32_t code = (word >> (bit & 7)) & mask;  // 24 + 7 bits at most
        const int64_t g = p.group ? p.group[j] : 0;
        main[j] = static_cast<int32_t>((g * own + (code & main_mask)) * v);
        if (residual) residual[j] = static_cast<int32_t>((g * other + (code >> p.main_bits)) * v);
    }
}

template <class T>
void decode_row(const DecodeProblem& p, int64_t r, int32_t* main, int32_t* residual) {
    unpack(p, p.packed + r * p.stride, main, residual);
    T* const values = static_cast<T*>(p.values);
    for (int64_t i = 0; i < p.v && r * p.v + i < p.rows; ++i) {
        T* const row = values + (r * p.v + i) * p.columns;
        const float* const c = p.centroids + i;
        const float* const d = p.residuals ? p.residuals + i : nullptr;
        if (!d && !p.place && !p.scale) {
            for (int64_t j = 0; j < p.count; ++j) row[j] = as(c[main[j]], T{});
            continue;
        }
        for (int64_t j = 0; j < p.count; ++j) {
            const int64_t at = p.place ? p.place[j] : j;
            float x = c[main[j]];
            if (d) x += d[residual[j]];
            if (p.scale) x = x * p.scale[at] + p.bias[at];
            row[at] = as(x, T{});
        }
    }
}

}  // namespace

void codebook_decode(const DecodeProblem& p, [[maybe_unused]] int threads) {
    const int64_t rows = (p.rows + p.v - 1) / p.v;
#pragma omp parallel num_threads(threads)
    {
        std::vector<int32_t> main(p.count), residual(p.residuals ? p.count : 0);
#pragma omp for schedule(static)
        for (int64_t r = 0; r < rows; ++r) {
            int32_t* const other = p.residuals ? residual.data() : nullptr;
            p.bfloat16 ? decode_row<uint16_t>(p, r, main.data(), other) : decode_row<float>(p, r, main.data(), other);
        }
    }
}

}  // namespace dither
