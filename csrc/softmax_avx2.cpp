#include "storage_avx2.hpp"

#include "ext_exp_avx2.hpp"

#include "ext_exp.hpp"
#include "softmax_row.hpp"

namespace dither {

const SoftmaxPasses& softmax_passes_avx2(Number type) { return softmax_passes(type); }

}  // namespace dither
