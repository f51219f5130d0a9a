#include "dequantize_row.hpp"
#include "unpack_avx2.hpp"

namespace dither {

DequantizeRow dequantize_row_avx2(const DequantizeProblem& p) {
    if (!p.table) return dequantize_row<Unpack<Whole>>;
    return p.bits <= 4 ? dequantize_row<Unpack<Near>> : dequantize_row<Unpack<Far>>;
}

}  // namespace dither
