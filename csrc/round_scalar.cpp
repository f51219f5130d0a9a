#include "simd_scalar.hpp"

#include "round_row.hpp"

namespace dither {

// One lane: such a loop the compiler turns into vectors by itself; arrays of four it takes apart.
RoundRow round_row_scalar() { return round_row<Scalar<float, 1>>; }
RoundPiece round_piece_scalar() { return round_piece<Scalar<float, 1>>; }

}  // namespace dither
