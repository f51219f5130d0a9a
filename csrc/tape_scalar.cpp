#include "storage_scalar.hpp"

#include "ext_exp_scalar.hpp"

#include "ext_exp.hpp"
#include "tape_row.hpp"

namespace dither {

TapeKernel tape_kernel_scalar() { return tape_kernel(); }

}  // namespace dither
