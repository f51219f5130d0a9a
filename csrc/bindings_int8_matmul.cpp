// int8_matmul.hpp for Python. Matrices come as addresses, which costs less than taking tensors apart; dither/kernels/int8_matmul.py holds the tensors and
// checks their shapes, types and density.
#include "bindings.hpp"

#include "int8_matmul.hpp"

namespace dither {

namespace {

// the numbers of `grid`, `scale_type` and `step_type` are those of the enumerations and of `scale_types`; way: 0, or what a test wants
bool bound_int8_matmul(uintptr_t packed, int64_t rows, int64_t columns, int bits, uintptr_t scale, int scale_type, uintptr_t zero, int middle,
                       int64_t group, int grid, float divisor, float lowest, float highest, int input_middle, int step_type, uintptr_t x,
                       int64_t tokens, bool bfloat16, uintptr_t y, int way, const char* isa, int threads) {
    Int8Matmul p{};
    p.rows = rows;
    p.columns = columns;
    p.group = group;
    p.groups = (columns + group - 1) / group;
    p.tokens = tokens;
    p.bits = bits;
    p.packed = reinterpret_cast<const uint8_t*>(packed);
    p.scale = reinterpret_cast<const void*>(scale);
    p.scale_type = static_cast<ScaleStorage>(scale_type);
    p.zero = reinterpret_cast<const uint8_t*>(zero);
    p.middle = middle;
    p.x = reinterpret_cast<const void*>(x);
    p.x_next = columns;
    p.bfloat16 = bfloat16;
    p.grid = static_cast<TokenGrid>(grid);
    p.divisor = divisor;
    p.lowest = lowest;
    p.highest = highest;
    p.input_middle = input_middle;
    p.step_type = scale_types[step_type];
    p.out = reinterpret_cast<void*>(y);
    p.out_next = rows;
    p.way = static_cast<Int8Way>(way);
    const Isa chosen = parse_isa(isa);
    nb::gil_scoped_release release;
    return int8_matmul(p, chosen, threads);
}

}  // namespace

void bind_int8_matmul(nb::module_& m) { m.def("int8_matmul", &bound_int8_matmul); }

}  // namespace dither
