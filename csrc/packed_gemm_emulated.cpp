// Tiles without AMX, for tests: everything else is plain C++ too.
#include "storage_scalar.hpp"
#include "transpose_scalar.hpp"
#include "unpack_scalar.hpp"

#include "packed_gemm_panel.hpp"
#include "packed_gemm_tile.hpp"
#include "packed_gemm_tiles.hpp"
#include "tiles_emulated.hpp"

namespace dither {

GemmKernel gemm_kernel_emulated() { return {2, 4, decode_panel<Unpack, uint16_t, transpose_panel>, tile<EmulatedTiles>, finish}; }

}  // namespace dither
