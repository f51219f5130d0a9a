#include "storage_scalar.hpp"

#include "ext_exp_scalar.hpp"

#include "ext_exp.hpp"
#include "softmax_row.hpp"

namespace dither {

const SoftmaxPasses& softmax_passes_scalar(Number type) { return softmax_passes(type); }

}  // namespace dither
