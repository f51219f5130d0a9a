#include "dequantize_row.hpp"
#include "unpack_avx512.hpp"

namespace dither {

DequantizeRow dequantize_row_avx512() { return dequantize_row<Unpack>; }

}  // namespace dither
