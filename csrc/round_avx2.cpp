#include "simd_avx2.hpp"

#include "round_row.hpp"

namespace dither {

RoundRow round_row_avx2() { return round_row<F32>; }
RoundPiece round_piece_avx2() { return round_piece<F32>; }

}  // namespace dither
