// softmax.hpp for Python. Rows come as addresses: a call on a short row costs less than taking its tensors apart. Shapes, types, density and
// overlap are checked in dither/kernels/softmax.py, which holds the tensors.
#include "bindings.hpp"

#include "softmax.hpp"

namespace dither {

namespace {

// the numbers of `type`, `algorithm` and `output` are those of the enumerations
void bound_softmax(uintptr_t x, int64_t rows, int64_t columns, int type, int algorithm, int output, bool stream, uintptr_t y, const char* isa,
                   int threads) {
    SoftmaxProblem p{};
    p.rows = rows;
    p.columns = columns;
    p.type = static_cast<Number>(type);
    p.algorithm = static_cast<SoftmaxAlgorithm>(algorithm);
    p.output = static_cast<SoftmaxOutput>(output);
    p.stream = stream;
    p.x = reinterpret_cast<const void*>(x);
    p.y = reinterpret_cast<void*>(y);
    const Isa chosen = parse_isa(isa);
    nb::gil_scoped_release release;
    softmax(p, chosen, threads);
}

void bound_gradient(uintptr_t y, uintptr_t g, int64_t rows, int64_t columns, int type, uintptr_t dx, const char* isa, int threads) {
    const SoftmaxGradient p{rows, columns, static_cast<Number>(type), reinterpret_cast<const void*>(y), reinterpret_cast<const void*>(g),
                            reinterpret_cast<void*>(dx)};
    const Isa chosen = parse_isa(isa);
    nb::gil_scoped_release release;
    softmax_gradient(p, chosen, threads);
}

}  // namespace

void bind_softmax(nb::module_& m) {
    m.def("softmax", &bound_softmax);
    m.def("softmax_gradient", &bound_gradient);
}

}  // namespace dither
