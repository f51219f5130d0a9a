// packed_gemm.hpp for Python. Memory comes as addresses, as in packed_matmul: shapes, types and density are checked in
// dither/kernels/packed_matmul.py, which holds the tensors. scale_type: the number in `ScaleStorage`; zero, values: 0 for none; way: 0, or what a test wants.
#include "bindings.hpp"

#include <algorithm>

#include "packed_gemm.hpp"

namespace dither {

namespace {

void bound_packed_gemm(uintptr_t packed, int64_t rows, int64_t columns, int bits, uintptr_t scale, int scale_type, float tensor_scale,
                       uintptr_t values, uintptr_t zero, float middle,
                       int64_t group, uintptr_t x, int64_t tokens, bool bfloat16, uintptr_t y, int64_t l1, int64_t l2, int way, const char* isa, int threads) {
    PackedGemm p{};
    p.rows = rows;
    p.columns = columns;
    p.group = std::min(group, std::max<int64_t>(columns, 1));
    p.groups = (columns + p.group - 1) / p.group;
    p.bits = bits;
    p.packed = reinterpret_cast<const uint8_t*>(packed);
    p.scale = reinterpret_cast<const void*>(scale);
    p.scale_type = static_cast<ScaleStorage>(scale_type);
    p.tensor_scale = tensor_scale;
    p.values = reinterpret_cast<const float*>(values);
    p.zero = reinterpret_cast<const uint8_t*>(zero);
    p.middle = middle;
    p.tokens = tokens;
    p.x = reinterpret_cast<const void*>(x);
    p.bfloat16 = bfloat16;
    p.y = reinterpret_cast<void*>(y);
    p.x_next = columns;
    p.y_next = rows;
    p.l1 = l1;
    p.l2 = l2;
    p.way = static_cast<GemmWay>(way);
    const Isa chosen = parse_isa(isa);
    nb::gil_scoped_release release;
    packed_gemm(p, chosen, threads);
}

}  // namespace

void bind_packed_gemm(nb::module_& m) { m.def("packed_gemm", &bound_packed_gemm); }

}  // namespace dither
