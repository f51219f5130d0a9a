#include "codebook_matmul_row.hpp"
#include "codebook_matmul_short.hpp"

namespace dither {

CodebookRows codebook_rows_avx2(int64_t width) { return width == 4 ? codebook_rows<Four, Eight<2>> : codebook_rows<Eight<1>, Eight<1>>; }

}  // namespace dither
