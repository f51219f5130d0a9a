#include "codebook_matmul_row.hpp"
#include "codebook_matmul_short.hpp"
#include "simd_avx512.hpp"

namespace dither {

CodebookRows codebook_rows_avx512(int64_t width) {
    return width == 4 ? codebook_rows<Four> : width == 8 ? codebook_rows<Eight> : codebook_rows<F32>;
}

}  // namespace dither
