// The Python face of the kernels. Shapes, dtypes, strides and index ranges are checked in dither/kernels/*.py before they come here.
#include "bindings.hpp"

#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <optional>
#include <string>
#include <vector>

#include "attention.hpp"
#include "codebook.hpp"
#include "cpu.hpp"
#include "dequantize.hpp"
#include "gptq.hpp"
#include "gram.hpp"
#include "hadamard.hpp"
#include "packed_matmul.hpp"
#include "packing.hpp"
#include "partial.hpp"
#include "round.hpp"

using namespace nb::literals;
using dither::Matrix;
using dither::Vector;

namespace {

// heads' queries, keys or values: any strides but for the last axis, which is dense (checked in Python)
using Heads = nb::ndarray<const int16_t, nb::ndim<4>, nb::device::cpu>;

dither::Strides strides_of(const Heads& x) { return {x.stride(0), x.stride(1), x.stride(2)}; }

void attention(Heads q, Heads k, Heads v, float scale, nb::ndarray<int16_t, nb::ndim<4>, nb::c_contig, nb::device::cpu> out, int threads) {
    dither::AttentionProblem p{};
    p.batch = static_cast<int64_t>(q.shape(0));
    p.heads = static_cast<int64_t>(q.shape(1));
    p.groups = static_cast<int64_t>(k.shape(1));
    p.length = static_cast<int64_t>(q.shape(2));
    p.width = static_cast<int64_t>(q.shape(3));
    p.value_width = static_cast<int64_t>(v.shape(3));
    p.scale = scale;
    p.q = reinterpret_cast<const uint16_t*>(q.data());
    p.k = reinterpret_cast<const uint16_t*>(k.data());
    p.v = reinterpret_cast<const uint16_t*>(v.data());
    p.q_stride = strides_of(q);
    p.k_stride = strides_of(k);
    p.v_stride = strides_of(v);
    p.out = reinterpret_cast<uint16_t*>(out.data());  // [B, T, H, e], dense
    p.out_stride = {p.length * p.heads * p.value_width, p.value_width, p.heads * p.value_width};
    nb::gil_scoped_release release;
    dither::attention(p, threads);
}

template <class T>
void gptq(Matrix<const T> weight, Matrix<const T> factor, Matrix<const T> scale, std::optional<Matrix<const T>> shift,
          Vector<const int64_t> column_group, int kind, int code_max, std::optional<Vector<const T>> table,
          std::optional<Vector<const T>> edges, std::optional<Vector<const uint8_t>> table_codes, std::optional<Matrix<const T>> levels,
          std::optional<Matrix<const uint8_t>> binary, Matrix<uint8_t> codes, Vector<double> loss, std::optional<Matrix<T>> errors,
          const std::string& isa, int threads) {
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
    if (levels) {
        p.levels = levels->data();
        p.binary = binary.value().data();
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
          "table_codes"_a.noconvert().none(), "levels"_a.noconvert().none(), "binary"_a.noconvert().none(), "codes"_a.noconvert(),
          "loss"_a.noconvert(), "errors"_a.noconvert().none(), "isa"_a, "threads"_a);
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
                std::optional<Vector<const float>> table, Matrix<T> values, const std::string& isa, int threads) {
    dither::DequantizeProblem p{};
    p.rows = static_cast<int64_t>(values.shape(0));
    p.columns = static_cast<int64_t>(values.shape(1));
    p.group = group;
    p.groups = static_cast<int64_t>(scale.shape(1));
    p.bits = bits;
    p.packed = packed.data();
    p.table = table ? table->data() : nullptr;
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
          "table"_a.noconvert().none(), "values"_a.noconvert(), "isa"_a, "threads"_a);
}

// Called for every layer and token, so memory comes as addresses: taking five tensors apart costs as much as the product of a small layer.
// scale_type: the number in `ScaleStorage`; zero, values: 0 for none. Shapes, types and density are checked in Python, which holds the tensors.
void packed_matmul(uintptr_t packed, int64_t rows, int64_t columns, int bits, uintptr_t scale, int scale_type, float tensor_scale, uintptr_t values,
                   uintptr_t zero, float middle, int64_t group, uintptr_t x, int64_t tokens, bool exact, uintptr_t y, const char* isa, int threads) {
    dither::PackedMatmul p{};
    p.rows = rows;
    p.columns = columns;
    p.group = group;
    p.groups = (columns + group - 1) / group;
    p.tokens = tokens;
    p.bits = bits;
    p.packed = reinterpret_cast<const uint8_t*>(packed);
    p.scale = reinterpret_cast<const void*>(scale);
    p.scale_type = static_cast<dither::ScaleStorage>(scale_type);
    p.tensor_scale = tensor_scale;
    p.values = reinterpret_cast<const float*>(values);
    p.zero = reinterpret_cast<const uint8_t*>(zero);
    p.middle = middle;
    p.x = reinterpret_cast<const float*>(x);
    p.exact = exact;
    p.y = reinterpret_cast<float*>(y);
    const dither::Isa chosen = dither::parse_isa(isa);
    nb::gil_scoped_release release;
    dither::packed_matmul(p, chosen, threads);
}

bool round_affine(Matrix<const float> weight, int code_max, int64_t group, int scale_type, Matrix<float> values, const std::string& isa,
                  int threads) {
    dither::RoundProblem p{};
    p.rows = static_cast<int64_t>(weight.shape(0));
    p.columns = static_cast<int64_t>(weight.shape(1));
    p.group = group;
    p.code_max = static_cast<float>(code_max);
    p.scale = dither::scale_types[scale_type];
    p.weight = weight.data();
    p.values = values.data();
    const dither::Isa chosen = dither::parse_isa(isa.c_str());
    nb::gil_scoped_release release;
    return dither::round_affine(p, chosen, threads);
}

bool round_to_one_grid(Matrix<const float> x, float scale, float lowest, float highest, Matrix<float> values, const std::string& isa, int threads) {
    const dither::GridProblem p{static_cast<int64_t>(x.size()), scale, lowest, highest, x.data(), values.data()};
    const dither::Isa chosen = dither::parse_isa(isa.c_str());
    nb::gil_scoped_release release;
    return dither::round_to_one_grid(p, chosen, threads);
}

template <class T>
void hadamard(Matrix<const T> x, const std::vector<int64_t>& sizes, Vector<const float> signs, int64_t power, Matrix<T> y,
              const std::string& isa, int threads) {
    dither::HadamardProblem p{};
    p.rows = static_cast<int64_t>(x.shape(0));
    p.columns = static_cast<int64_t>(x.shape(1));
    p.factors = static_cast<int64_t>(sizes.size());
    p.sizes = sizes.data();
    p.signs = signs.data();
    p.power = power;
    p.x = x.data();
    p.y = y.data();
    p.bfloat16 = sizeof(T) == 2;
    const dither::Isa chosen = dither::parse_isa(isa.c_str());
    nb::gil_scoped_release release;
    dither::hadamard(p, chosen, threads);
}

template <class T>
void bind_hadamard(nb::module_& m) {
    m.def("hadamard", &hadamard<T>, "x"_a.noconvert(), "sizes"_a, "signs"_a.noconvert(), "power"_a, "y"_a.noconvert(), "isa"_a, "threads"_a);
}

template <class T>
dither::Book<T> book_of(const Matrix<const T>& centroids, const Vector<const T>& half_square) {
    return {static_cast<int64_t>(centroids.shape(0)), centroids.data(), half_square.data()};
}

template <class T>
void codebook_nearest(Matrix<const T> vectors, Matrix<const T> centroids, Vector<const T> half_square, Vector<int32_t> codes,
                      const std::string& isa, int threads) {
    dither::NearestProblem<T> p{};
    p.count = static_cast<int64_t>(vectors.shape(0));
    p.v = static_cast<int64_t>(vectors.shape(1));
    p.vectors = vectors.data();
    p.book = book_of(centroids, half_square);
    p.codes = codes.data();
    const dither::Isa chosen = dither::parse_isa(isa.c_str());
    nb::gil_scoped_release release;
    dither::codebook_nearest(p, chosen, threads);
}

template <class T>
void codebook_sweep(Matrix<const T> values, std::optional<Matrix<const T>> base, Matrix<const T> mix, Matrix<const T> centroids,
                    Vector<const T> half_square, std::optional<Matrix<const T>> residuals, std::optional<Vector<const T>> residual_half_square,
                    Matrix<int32_t> codes, Matrix<T> errors, const std::string& isa, int threads) {
    dither::SweepProblem<T> p{};
    p.v = static_cast<int64_t>(centroids.shape(1));
    p.rows = static_cast<int64_t>(codes.shape(0));
    p.columns = static_cast<int64_t>(values.shape(1));
    p.values = values.data();
    p.base = base ? base->data() : nullptr;
    p.mix = mix.data();
    p.books[0] = book_of(centroids, half_square);
    if (residuals) p.books[1] = book_of(*residuals, residual_half_square.value());
    p.codes = codes.data();
    p.errors = errors.data();
    const dither::Isa chosen = dither::parse_isa(isa.c_str());
    nb::gil_scoped_release release;
    dither::codebook_sweep(p, chosen, threads);
}

template <class T>
void bind_codebook(nb::module_& m) {
    m.def("codebook_nearest", &codebook_nearest<T>, "vectors"_a.noconvert(), "centroids"_a.noconvert(), "half_square"_a.noconvert(),
          "codes"_a.noconvert(), "isa"_a, "threads"_a);
    m.def("codebook_sweep", &codebook_sweep<T>, "values"_a.noconvert(), "base"_a.noconvert().none(), "mix"_a.noconvert(),
          "centroids"_a.noconvert(), "half_square"_a.noconvert(), "residuals"_a.noconvert().none(), "residual_half_square"_a.noconvert().none(),
          "codes"_a.noconvert(), "errors"_a.noconvert(), "isa"_a, "threads"_a);
}

template <class T>
void codebook_decode(Matrix<const uint8_t> packed, int64_t count, int bits, int main_bits, Matrix<const float> centroids,
                     std::optional<Matrix<const float>> residuals, std::optional<Vector<const uint8_t>> group,
                     std::optional<Vector<const int32_t>> place, std::optional<Vector<const float>> scale, std::optional<Vector<const float>> bias,
                     Matrix<T> values, int threads) {
    dither::DecodeProblem p{};
    p.rows = static_cast<int64_t>(values.shape(0));
    p.columns = static_cast<int64_t>(values.shape(1));
    p.count = count;
    p.v = static_cast<int64_t>(centroids.shape(1));
    p.bits = bits;
    p.main_bits = main_bits;
    p.packed = packed.data();
    p.stride = static_cast<int64_t>(packed.shape(1));
    p.centroids = centroids.data();
    p.residuals = residuals ? residuals->data() : nullptr;
    p.group = group ? group->data() : nullptr;
    p.place = place ? place->data() : nullptr;
    p.scale = scale ? scale->data() : nullptr;
    p.bias = bias ? bias->data() : nullptr;
    p.values = values.data();
    p.bfloat16 = sizeof(T) == 2;
    nb::gil_scoped_release release;
    dither::codebook_decode(p, threads);
}

template <class T>
void bind_codebook_decode(nb::module_& m) {
    m.def("codebook_decode", &codebook_decode<T>, "packed"_a.noconvert(), "count"_a, "bits"_a, "main_bits"_a, "centroids"_a.noconvert(),
          "residuals"_a.noconvert().none(), "group"_a.noconvert().none(), "place"_a.noconvert().none(), "scale"_a.noconvert().none(),
          "bias"_a.noconvert().none(), "values"_a.noconvert(), "threads"_a);
}

template <class T>
void partial(std::optional<Matrix<const uint8_t>> mask, Matrix<const uint8_t> plane, Matrix<const float> low, Matrix<const float> high,
             std::optional<Vector<const uint8_t>> codes, int rest, std::optional<Vector<const uint32_t>> offsets, Vector<const float> scale,
             Vector<const float> zero, int64_t group, Matrix<T> values, const std::string& isa, int threads) {
    dither::PartialProblem p{};
    p.rows = static_cast<int64_t>(values.shape(0));
    p.columns = static_cast<int64_t>(values.shape(1));
    p.group = group;
    p.groups = static_cast<int64_t>(low.shape(1));
    p.rest = rest;
    p.mask = mask ? mask->data() : nullptr;
    p.plane = plane.data();
    p.low = low.data();
    p.high = high.data();
    if (codes) {
        p.codes = codes->data();
        p.code_bytes = static_cast<int64_t>(codes->shape(0));
    }
    p.offsets = offsets ? offsets->data() : nullptr;
    p.scale = scale.data();
    p.zero = zero.data();
    p.values = values.data();
    p.bfloat16 = sizeof(T) == 2;
    const dither::Isa chosen = dither::parse_isa(isa.c_str());
    nb::gil_scoped_release release;
    dither::partial(p, chosen, threads);
}

template <class T>
void bind_partial(nb::module_& m) {
    m.def("partial", &partial<T>, "mask"_a.noconvert().none(), "plane"_a.noconvert(), "low"_a.noconvert(), "high"_a.noconvert(),
          "codes"_a.noconvert().none(), "rest"_a, "offsets"_a.noconvert().none(), "scale"_a.noconvert(), "zero"_a.noconvert(), "group"_a,
          "values"_a.noconvert(), "isa"_a, "threads"_a);
}

void places(Vector<const uint8_t> low, int low_bits, Vector<const uint8_t> high, int64_t count, int64_t columns, bool listed,
            Matrix<uint8_t> bitmap) {
    dither::PlacesProblem p{};
    p.rows = static_cast<int64_t>(bitmap.shape(0));
    p.columns = columns;
    p.count = count;
    p.low_bits = low_bits;
    p.low = low.data();
    p.low_bytes = static_cast<int64_t>(low.shape(0));
    p.high = high.data();
    p.high_bytes = static_cast<int64_t>(high.shape(0));
    p.listed = listed;
    p.bitmap = bitmap.data();
    nb::gil_scoped_release release;
    dither::places(p);
}

}  // namespace

NB_MODULE(_C, m) {
    m.def("attention", &attention, "q"_a.noconvert(), "k"_a.noconvert(), "v"_a.noconvert(), "scale"_a, "out"_a.noconvert(), "threads"_a);
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
    m.def("packed_matmul", &packed_matmul);
    m.def("round_to_one_grid", &round_to_one_grid, "x"_a.noconvert(), "scale"_a, "lowest"_a, "highest"_a, "values"_a.noconvert(), "isa"_a,
          "threads"_a);
    m.def("round_affine", &round_affine, "weight"_a.noconvert(), "code_max"_a, "group"_a, "scale_type"_a, "values"_a.noconvert(), "isa"_a,
          "threads"_a);
    bind_hadamard<float>(m);
    bind_hadamard<int16_t>(m);
    dither::bind_fwht(m);
    dither::bind_int8_matmul(m);
    bind_codebook<float>(m);
    bind_codebook<double>(m);
    bind_codebook_decode<float>(m);
    bind_codebook_decode<int16_t>(m);
    bind_partial<float>(m);
    bind_partial<int16_t>(m);
    m.def("places", &places, "low"_a.noconvert(), "low_bits"_a, "high"_a.noconvert(), "count"_a, "columns"_a, "listed"_a,
          "bitmap"_a.noconvert());
    dither::bind_bessel(m);
    dither::bind_lookup(m);
    dither::bind_packed_gemm(m);
    dither::bind_softmax(m);
    dither::bind_tape(m);
    m.def("isa", [](const std::string& name) { return dither::name_of(dither::parse_isa(name.c_str())); }, "name"_a);
    m.def("has_avx512_bf16", &dither::has_avx512_bf16);
    m.def("has_amx_bf16", &dither::has_amx_bf16);
}
