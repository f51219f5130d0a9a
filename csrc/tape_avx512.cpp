#include "storage_avx512.hpp"

#include "ext_exp_avx512.hpp"

#include "ext_exp.hpp"
#include "tape_row.hpp"

namespace dither {

TapeKernel tape_kernel_avx512() { return tape_kernel(); }

}  // namespace dither
