#include "simd_avx2.hpp"

#include "codebook_tile.hpp"

namespace dither {

template <> CodebookTiles<float> codebook_tiles_avx2<float>() { return codebook_tiles<F32>(); }
template <> CodebookTiles<double> codebook_tiles_avx2<double>() { return codebook_tiles<F64>(); }

}  // namespace dither
