#include "storage_avx2.hpp"

#include "ext_exp_avx2.hpp"

#include "ext_exp.hpp"
#include "tape_row.hpp"

namespace dither {

TapeKernel tape_kernel_avx2() { return tape_kernel(); }

}  // namespace dither
