// Sixteen rows of lanes of 32 bits to a panel, in plain C++: [16][depth] -> [depth][16].
#pragma once

#include <cstdint>

namespace {

inline void transpose_panel(const float* rows, int64_t depth, float* panel) {
    for (int64_t k = 0; k < depth; ++k)
        for (int64_t r = 0; r < 16; ++r) panel[k * 16 + r] = rows[r * depth + k];
}

}  // namespace
