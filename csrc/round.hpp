// Weights rounded to the min-max grid of their group, in one pass over memory: what dither.formats.Int gives when it fits, encodes and
// decodes. In a group of a row, with N = code_max,
//     lo = min(w, 0),  hi = max(w, 0),  s = (hi - lo) / N as its storage type holds it,  z = clamp(rne(-lo / s), 0, N)
//     value = s (clamp(rne(w / s) + z, 0, N) - z)
// One rounding an operation: the bits of the torch reference.
#pragma once

#include <cstdint>

#include "cpu.hpp"

namespace dither {

// How a scale is stored. `round_to`: 1.5 * 2^23 steps of a number in [1, 2), which rounds to such a step what is added to it (0: float32).
struct ScaleType {
    float smallest, largest;  // what a scale is kept within
    float smallest_normal;    // below, steps stay as they are there
    float round_to;
};

inline constexpr ScaleType scale_types[] = {
    {0x1p-24f, 65504.0f, 0x1p-14f, 1.5f * 0x1p13f},           // float16: 10 fraction bits
    {0x1p-126f, 0x1.fep127f, 0x1p-126f, 1.5f * 0x1p16f},      // bfloat16: 7 fraction bits
    {0x1p-126f, 0x1.fffffep127f, 0x1p-126f, 0.0f},            // float32
};

struct RoundProblem {
    int64_t rows, columns, group;  // O, I, g <= I; the last group of a row may be shorter
    float code_max;                // N = 1 .. 255
    ScaleType scale;
    const float* weight;  // [O, I]
    float* values;        // [O, I]
};

using RoundRow = bool (*)(const RoundProblem&, int64_t row);  // whether every weight of the row is finite

RoundRow round_row_scalar();
#ifdef DITHER_X86
RoundRow round_row_avx2();
RoundRow round_row_avx512();
#endif

// False where a weight is NaN or infinite; the values are then of no use.
bool round_affine(const RoundProblem&, Isa isa, int threads);

// The same on one grid, given, for all values:  value = s clamp(rne(x / s), lo, hi),  lo = -z, hi = N - z whole numbers below 2^22.
struct GridProblem {
    int64_t count;
    float scale, lowest, highest;
    const float* x;  // [count]
    float* values;   // [count]
};

using RoundPiece = bool (*)(const GridProblem&, int64_t first, int64_t count);  // whether every value of the piece is finite

RoundPiece round_piece_scalar();
#ifdef DITHER_X86
RoundPiece round_piece_avx2();
RoundPiece round_piece_avx512();
#endif

bool round_to_one_grid(const GridProblem&, Isa isa, int threads);

}  // namespace dither
