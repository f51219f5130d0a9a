#include "dequantize_row.hpp"
#include "unpack_avx2.hpp"

namespace dither {

DequantizeRow dequantize_row_avx2() { return dequantize_row<Unpack>; }

}  // namespace dither
