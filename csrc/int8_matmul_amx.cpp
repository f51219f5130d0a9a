#include "int8_vnni.hpp"

#include "int8_tiles.hpp"
#include "tiles_amx.hpp"

namespace dither {

Int8Kernel int8_kernel_amx() { return int8_kernel<Vnni, ByteTiles<AmxTiles>>(int8_row_avx512vnni); }

}  // namespace dither
