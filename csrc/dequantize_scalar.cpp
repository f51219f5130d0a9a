#include "dequantize_row.hpp"
#include "unpack_scalar.hpp"

namespace dither {

DequantizeRow dequantize_row_scalar(const DequantizeProblem&) { return dequantize_row<Unpack>; }

}  // namespace dither
