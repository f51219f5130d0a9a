#include "dequantize_row.hpp"
#include "unpack_avx512.hpp"

namespace dither {

DequantizeRow dequantize_row_avx512(const DequantizeProblem& p) {
    if (!p.table) return dequantize_row<Unpack<Whole>>;
    return p.bits <= 5 ? dequantize_row<Unpack<Near>> : dequantize_row<Unpack<Far>>;
}

}  // namespace dither
