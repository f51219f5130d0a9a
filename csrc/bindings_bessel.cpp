// Shapes, dtypes and region codes are checked in dither/kernels/bessel.py before they come here.
#include "bindings.hpp"

#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include <optional>
#include <string>

#include "bessel.hpp"

using namespace nb::literals;

namespace dither {

namespace {

void bessel(bool second, Vector<const double> v, Vector<const double> x, std::optional<Vector<const uint8_t>> regions, Matrix<const double> u,
            Matrix<const double> w, Vector<const double> gamma, Matrix<const double> logs, Matrix<const double> nodes, Vector<double> value,
            std::optional<Vector<double>> ratio, const std::string& isa, int threads) {
    BesselProblem p{};
    p.n = static_cast<int64_t>(v.shape(0));
    p.second = second;
    p.v = v.data();
    p.x = x.data();
    p.regions = regions ? regions->data() : nullptr;
    p.tables = {u.data(), w.data(), gamma.data(), logs.data(), nodes.data()};
    p.value = value.data();
    p.ratio = ratio ? ratio->data() : nullptr;
    const Isa chosen = parse_isa(isa.c_str());
    nb::gil_scoped_release release;
    log_bessel(p, chosen, threads);
}

// n a multiple of bessel_lanes
void elementary(int which, Matrix<const double> logs, Vector<const double> x, Vector<double> y, const std::string& isa) {
    bessel_kernel(parse_isa(isa.c_str())).elementary(which, logs.data(), x.data(), y.data(), static_cast<int64_t>(x.shape(0)));
}

}  // namespace

void bind_bessel(nb::module_& m) {
    m.def("log_bessel", &bessel, "second"_a, "v"_a.noconvert(), "x"_a.noconvert(), "regions"_a.noconvert().none(), "u"_a.noconvert(),
          "w"_a.noconvert(), "gamma"_a.noconvert(), "logs"_a.noconvert(), "nodes"_a.noconvert(), "value"_a.noconvert(),
          "ratio"_a.noconvert().none(), "isa"_a, "threads"_a);
    m.def("elementary", &elementary, "which"_a, "logs"_a.noconvert(), "x"_a.noconvert(), "y"_a.noconvert(), "isa"_a);
}

}  // namespace dither
