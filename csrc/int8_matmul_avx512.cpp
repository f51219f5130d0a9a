#include "int8_vnni.hpp"

namespace dither {

Int8Kernel int8_kernel_avx512() { return int8_kernel<Vnni>(int8_row_avx512vnni); }

}  // namespace dither
