// One row of dequantize.hpp, written once for every vector type. Codes [c, c + L) of a row start at a whole byte when L b is a multiple
// of 8; `Unpack<V>` turns the bytes there into L floats. Groups that are no multiple of L, and the last columns, go one by one.
#pragma once

#include <cstring>

#include "bfloat16.hpp"
#include "dequantize.hpp"
#include "packing.hpp"

namespace {

template <class Unpack>
void dequantize_row(const dither::DequantizeProblem& p, int64_t row) {
    constexpr int L = Unpack::lanes;
    const int64_t stride = dither::packed_stride(p.columns, p.bits);
    const uint8_t* const from = p.packed + row * stride;
    const uint8_t* const end = p.packed + p.rows * stride;
    char* const to = static_cast<char*>(p.values) + row * p.columns * (p.bfloat16 ? 2 : 4);
    const Unpack unpack(p.bits, p.table);
    const int64_t step = L * p.bits / 8;

    for (int64_t g = 0; g < p.groups; ++g) {
        const float scale = p.scale[row * p.groups + g], zero = p.zero[row * p.groups + g];
        const int64_t first = g * p.group, last = first + p.group < p.columns ? first + p.group : p.columns;
        int64_t i = first;
        if (first % L == 0) {
            const uint8_t* bytes = from + first / L * step;
            for (; i + L <= last; i += L, bytes += step) {
                uint8_t tail[Unpack::reach];
                const uint8_t* const source = readable(bytes, end, tail);
                if (p.bfloat16)
                    unpack.store_bfloat16(source, scale, zero, reinterpret_cast<uint16_t*>(to) + i);
                else
                    unpack.store_float32(source, scale, zero, reinterpret_cast<float*>(to) + i);
            }
        }
        for (; i < last; ++i) {
            const int code = index_at(from, end, i, p.bits);
            put(to, i, scale * ((p.table ? p.table[code] : static_cast<float>(code)) - zero), p.bfloat16);
        }
    }
}

}  // namespace
