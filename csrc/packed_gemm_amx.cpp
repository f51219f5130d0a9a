#include "packed_gemm_tiles.hpp"
#include "tiles_amx.hpp"

namespace dither {

GemmTile gemm_tile_amx() { return tile<AmxTiles>; }

}  // namespace dither
