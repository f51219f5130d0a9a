// One row of dequantize.hpp, written once for every vector type.
#pragma once

#include "decode_columns.hpp"
#include "dequantize.hpp"

namespace {

template <class Unpack>
void dequantize_row(const dither::DequantizeProblem& p, int64_t row) {
    const int64_t stride = dither::packed_stride(p.columns, p.bits);
    const float *const scale = p.scale + row * p.groups, *const zero = p.zero + row * p.groups;
    Unpack unpack(p.bits, p.table);
    const auto to = [&](auto* values) {
        decode_columns(unpack, p.bits, p.packed + row * stride, p.packed + p.rows * stride, p.group, 0, p.columns, [=](int64_t g) { return scale[g]; },
                       [=](int64_t g) { return zero[g]; }, values + row * p.columns);
    };
    if (p.bfloat16)
        to(static_cast<uint16_t*>(p.values));
    else
        to(static_cast<float*>(p.values));
}

}  // namespace
