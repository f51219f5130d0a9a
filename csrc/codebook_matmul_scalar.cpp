#include "codebook_matmul_row.hpp"
#include "simd_scalar.hpp"

namespace dither {

CodebookRows codebook_rows_scalar(int64_t) { return codebook_rows<Single<F32>, Single<F32>>; }

}  // namespace dither
