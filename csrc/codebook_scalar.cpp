#include "simd_scalar.hpp"

#include "codebook_tile.hpp"

namespace dither {

template <> CodebookTiles<float> codebook_tiles_scalar<float>() { return codebook_tiles<F32>(); }
template <> CodebookTiles<double> codebook_tiles_scalar<double>() { return codebook_tiles<F64>(); }

}  // namespace dither
