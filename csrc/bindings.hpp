// What the files that bind kernels to Python share. Operations outside quantization have files of their own, bindings_NAME.cpp.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

namespace nb = nanobind;

namespace dither {

template <class T>
using Vector = nb::ndarray<T, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
template <class T>
using Matrix = nb::ndarray<T, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

void bind_bessel(nb::module_& m);
void bind_fwht(nb::module_& m);
void bind_int8_matmul(nb::module_& m);
void bind_lookup(nb::module_& m);
void bind_packed_gemm(nb::module_& m);
void bind_softmax(nb::module_& m);
void bind_tape(nb::module_& m);

}  // namespace dither
