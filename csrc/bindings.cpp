// The Python face of the kernels. Shapes, dtypes, strides and index ranges are checked in dither/kernels/*.py before they come here.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include <optional>
#include <string>

#include "cpu.hpp"
#include "dequantize.hpp"
#include "gptq.hpp"
#include "gram.hpp"
#include "packing.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

template <class T>
using Vector = nb::ndarray<T, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
template <class T>
using Matrix = nb::ndarray<T, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

template <class T>
void gptq(Matrix<const T> weight, Matrix<const T> factor, Matrix<const T> scale, std::optional<Matrix<const T>> shift,
          Vector<const int64_t> column_group, int kind, int code_max, std::optional<Vector<const T>> table,
          std::optional<Vector<const T>> edges, std::optional<Vector<const uint8_t>> table_codes, Matrix<uint8_t> codes,
          Vector<double> loss, std::optional<Matrix<T>> errors, const std::string& isa, int threads) {
    dither::GptqProblem<T> p{};
    p.rows = static_cast<int64_t>(weight.shape(0));
    p.columns = static_cast<int64_t>(weight.shape(1));
    p.groups = static_cast<int64_t>(scale.shape(1));
    p.weight = weight.data();
    p.scale = scale.data();
    p.shift = shift ? shift->data() : nullptr;
    p.column_group = column_group.data();
    p.kind = static_cast<dither::GridKind>(kind);
    p.code_max = static_cast<T>(code_max);
    if (table) {
        p.table = table->data();
        p.edges = edges.value().data();
        p.table_codes = table_codes.value().data();
        p.table_size = static_cast<int64_t>(table->shape(0));
    }
    p.codes = codes.data();
    p.loss = loss.data();
    p.errors = errors ? errors->data() : nullptr;
    const dither::Isa chosen = dither::parse_isa(isa.c_str());
    nb::gil_scoped_release release;
    dither::gptq(p, factor.data(), chosen, threads);
}

template <class T>
void bind_gptq(nb::module_& m) {
    m.def("gptq", &gptq<T>, "weight"_a.noconvert(), "factor"_a.noconvert(), "scale"_a.noconvert(), "shift"_a.noconvert().none(),
          "column_group"_a.noconvert(), "kind"_a, "code_max"_a, "table"_a.noconvert().none(), "edges"_a.noconvert().none(),
          "table_codes"_a.noconvert().none(), "codes"_a.noconvert(), "loss"_a.noconvert(), "errors"_a.noconvert().none(), "isa"_a,
          "threads"_a);
}

template <class T>
void gram_update(Matrix<double> hessian, Matrix<const T> x, const std::string& isa, int threads) {
    const dither::Isa chosen = dither::parse_isa(isa.c_str());
    const auto type = sizeof(T) == 4 ? dither::RowType::float32 : dither::RowType::bfloat16;
    nb::gil_scoped_release release;
    dither::gram_update(hessian.data(), x.data(), type, static_cast<int64_t>(x.shape(0)), static_cast<int64_t>(x.shape(1)), chosen, threads);
}

void gram_mirror(Matrix<double> hessian, int threads) {
    nb::gil_scoped_release release;
    dither::gram_mirror(hessian.data(), static_cast<int64_t>(hessian.shape(0)), threads);
}

void pack_rows(Matrix<const uint8_t> codes, int bits, Matrix<uint8_t> packed, int threads) {
    nb::gil_scoped_release release;
    dither::pack_rows(codes.data(), static_cast<int64_t>(codes.shape(0)), static_cast<int64_t>(codes.shape(1)), bits, packed.data(), threads);
}

void unpack_rows(Matrix<const uint8_t> packed, int bits, Matrix<uint8_t> codes, int threads) {
    nb::gil_scoped_release release;
    dither::unpack_rows(packed.data(), static_cast<int64_t>(codes.shape(0)), static_cast<int64_t>(codes.shape(1)), bits, codes.data(), threads);
}

template <class T>
void dequantize(Matrix<const uint8_t> packed, int bits, Matrix<const float> scale, Matrix<const float> zero, int64_t group,
                Matrix<T> values, const std::string& isa, int threads) {
    dither::DequantizeProblem p{};
    p.rows = static_cast<int64_t>(values.shape(0));
    p.columns = static_cast<int64_t>(values.shape(1));
    p.group = group;
    p.groups = static_cast<int64_t>(scale.shape(1));
    p.bits = bits;
    p.packed = packed.data();
    p.scale = scale.data();
    p.zero = zero.data();
    p.values = values.data();
    p.bfloat16 = sizeof(T) == 2;
    const dither::Isa chosen = dither::parse_isa(isa.c_str());
    nb::gil_scoped_release release;
    dither::dequantize(p, chosen, threads);
}

template <class T>
void bind_dequantize(nb::module_& m) {
    m.def("dequantize", &dequantize<T>, "packed"_a.noconvert(), "bits"_a, "scale"_a.noconvert(), "zero"_a.noconvert(), "group"_a,
          "values"_a.noconvert(), "isa"_a, "threads"_a);
}

}  // namespace

NB_MODULE(_C, m) {
    bind_gptq<float>(m);
    bind_gptq<double>(m);
    // bfloat16 comes as its bits, int16
    m.def("gram_update", &gram_update<float>, "hessian"_a.noconvert(), "x"_a.noconvert(), "isa"_a, "threads"_a);
    m.def("gram_update", &gram_update<int16_t>, "hessian"_a.noconvert(), "x"_a.noconvert(), "isa"_a, "threads"_a);
    m.def("gram_mirror", &gram_mirror, "hessian"_a.noconvert(), "threads"_a);
    m.def("pack_rows", &pack_rows, "codes"_a.noconvert(), "bits"_a, "packed"_a.noconvert(), "threads"_a);
    m.def("unpack_rows", &unpack_rows, "packed"_a.noconvert(), "bits"_a, "codes"_a.noconvert(), "threads"_a);
    bind_dequantize<float>(m);
    bind_dequantize<int16_t>(m);
    m.def("isa", [](const std::string& name) { return dither::name_of(dither::parse_isa(name.c_str())); }, "name"_a);
    m.def("has_avx512_bf16", &dither::has_avx512_bf16);
}
