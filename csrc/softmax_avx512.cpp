#include "storage_avx512.hpp"

#include "ext_exp_avx512.hpp"

#include "ext_exp.hpp"
#include "softmax_row.hpp"

namespace dither {

const SoftmaxPasses& softmax_passes_avx512(Number type) { return softmax_passes(type); }

}  // namespace dither
