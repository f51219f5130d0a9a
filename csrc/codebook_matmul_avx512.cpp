#include "codebook_matmul_row.hpp"
#include "codebook_matmul_short.hpp"
#include "simd_avx512.hpp"

namespace dither {

CodebookRows codebook_rows_avx512(int64_t width) {
    switch (width) {
        case 4: return codebook_rows<Four, Sixteen<4>>;
        case 8: return codebook_rows<Eight<1>, Sixteen<2>>;
        default: return codebook_rows<Single<F32>, Single<F32>>;
    }
}

}  // namespace dither
