// Tiles without AMX, for tests, on processors that have the rest.
#include "int8_vnni.hpp"

#include "int8_tiles.hpp"
#include "tiles_emulated.hpp"

namespace dither {

Int8Kernel int8_kernel_emulated() { return int8_kernel<Vnni, ByteTiles<EmulatedTiles>>(int8_row_avx512vnni); }

}  // namespace dither
