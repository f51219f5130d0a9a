// Hadamard products in place (fwht.hpp) for Python.
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include <optional>
#include <string>

#include "bindings.hpp"
#include "fwht.hpp"

using namespace nb::literals;

namespace dither {

namespace {

template <class T>
void run(Matrix<T> x, std::optional<Matrix<const T>> signs, int64_t power, int64_t inner, T scale, const std::string& isa, int threads) {
    FwhtProblem<T> p{};
    p.rows = static_cast<int64_t>(x.shape(0));
    p.d = signs ? static_cast<int64_t>(signs->shape(0)) : 1;
    p.power = power;
    p.inner = inner;
    p.signs = signs ? signs->data() : nullptr;
    p.scale = scale;
    p.x = x.data();
    const Isa chosen = parse_isa(isa.c_str());
    nb::gil_scoped_release release;
    fwht(p, chosen, threads);
}

template <class T>
void bind(nb::module_& m) {
    m.def("fwht", &run<T>, "x"_a.noconvert(), "signs"_a.noconvert().none(), "power"_a, "inner"_a, "scale"_a, "isa"_a, "threads"_a);
}

}  // namespace

void bind_fwht(nb::module_& m) {
    bind<float>(m);
    bind<double>(m);
}

}  // namespace dither
