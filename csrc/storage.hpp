// Types that rows are stored in and nothing is computed in.
#pragma once

#include <cstdint>

namespace dither {

struct BFloat16 {
    uint16_t bits;
};

struct Float16 {
    uint16_t bits;
};

}  // namespace dither
