// tape.hpp for Python. Memory comes as addresses, of tensors that dither/kernels/tape.py has checked and holds.
#include "bindings.hpp"

#include <nanobind/stl/array.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <array>
#include <memory>
#include <string>
#include <vector>

#include "tape.hpp"

namespace dither {

namespace {

using Numbers = std::vector<int64_t>;

void* at(int64_t address) { return reinterpret_cast<void*>(static_cast<uintptr_t>(address)); }

// address, type, four strides
Place place(const std::array<int64_t, 6>& from) {
    return {at(from[0]), static_cast<Element>(from[1]), {from[2], from[3], from[4], from[5]}};
}

void elementwise(Tape& tape, int function, std::array<int64_t, 4> size, std::array<int64_t, 6> y, std::array<int64_t, 6> a, std::array<int64_t, 6> b,
                 bool constant, float value) {
    tape.add(Elementwise{static_cast<Function>(function), constant, value, {size[0], size[1], size[2], size[3]}, place(y), place(a), place(b)});
}

// A matrix as numbers: rows, y, y's type, weight; dense: its type; packed: bits, group, scale, type of scale, zero, values; for inputs that are rounded, then
// the grid and the type of its steps, and no values. And as floats: the middle of codes without zeros, the scale of the tensor; for such inputs the
// divisor, lowest, highest and middle of their codes.
using Floats = std::array<float, 6>;

PackedWeights packed_weights(const Numbers& m, int64_t columns, const Floats& floats) {
    PackedWeights w{};
    w.rows = m[0], w.columns = columns;
    w.packed = static_cast<const uint8_t*>(at(m[3]));
    w.bits = static_cast<int>(m[4]);
    w.group = m[5];
    w.groups = (columns + w.group - 1) / w.group;
    w.scale = at(m[6]);
    w.scale_type = static_cast<ScaleStorage>(m[7]);
    w.zero = static_cast<const uint8_t*>(at(m[8]));
    w.values = static_cast<const float*>(at(m[9]));
    w.middle = floats[0];
    w.tensor_scale = floats[1];
    return w;
}

Product::Kind kind_of(const Numbers& m) { return m.size() < 6 ? Product::plain : m.size() < 11 ? Product::packed : Product::rounded; }

Dense dense(const Numbers& m, int64_t columns) { return {m[0], columns, static_cast<Element>(m[4]), at(m[3])}; }

// The numbers of the grid are those of the enumerations and of `scale_types`.
Int8Matmul integers(const Numbers& m, int64_t columns, const Floats& floats) {
    const PackedWeights w = packed_weights(m, columns, floats);
    Int8Matmul p{};
    p.rows = w.rows, p.columns = w.columns, p.group = w.group, p.groups = w.groups, p.bits = w.bits;
    p.packed = w.packed, p.scale = w.scale, p.scale_type = w.scale_type, p.zero = w.zero;
    p.middle = static_cast<int32_t>(floats[0]);
    p.tokens = 1;
    p.grid = static_cast<TokenGrid>(m[10]);
    p.step_type = scale_types[m[11]];
    p.divisor = floats[2], p.lowest = floats[3], p.highest = floats[4];
    p.input_middle = static_cast<int32_t>(floats[5]);
    return p;
}

void lookup(Tape& tape, bool by_length, int64_t columns, const Numbers& m, const Floats& floats) {
    Lookup p{};
    p.by_length = by_length;
    p.packed = kind_of(m) == Product::packed;
    if (p.packed) p.codes = packed_weights(m, columns, floats);
    else p.dense = dense(m, columns);
    p.y = at(m[1]);
    p.y_type = static_cast<Element>(m[2]);
    tape.add(p);
}

void multiply(Tape& tape, int64_t x, int x_type, int64_t columns, const std::vector<Numbers>& matrices, const std::vector<Floats>& floats) {
    Products p{at(x), static_cast<Element>(x_type), columns, {}};
    for (std::size_t i = 0; i < matrices.size(); ++i) {
        const Numbers& m = matrices[i];
        Product one{};
        one.y = at(m[1]);
        one.y_type = static_cast<Element>(m[2]);
        one.kind = kind_of(m);
        if (one.kind == Product::packed) {
            static_cast<PackedWeights&>(one.codes) = packed_weights(m, columns, floats[i]);
            one.codes.tokens = 1;
            one.codes.exact = p.x_type == Element::float32;
        } else if (one.kind == Product::rounded) {
            one.integers = integers(m, columns, floats[i]);
            one.integers.x = p.x;
            one.integers.bfloat16 = p.x_type == Element::bfloat16;
        } else {
            one.dense = dense(m, columns);
        }
        p.of.push_back(one);
    }
    tape.add(p);
}

// q, k, v: address, stride of heads, stride of features; y: address, stride of heads
void attend(Tape& tape, int64_t layer, std::array<int64_t, 4> sizes, float scale, int type, std::array<int64_t, 3> q, std::array<int64_t, 3> k,
            std::array<int64_t, 3> v, std::array<int64_t, 2> y) {
    const auto head = [](const std::array<int64_t, 3>& from) { return Head{at(from[0]), from[1], from[2]}; };
    tape.add(Attend{layer, sizes[0], sizes[1], sizes[2], sizes[3], scale, static_cast<Element>(type), head(q), head(k), head(v), at(y[0]), y[1]});
}

std::vector<Attended> attended(const Numbers& row, std::size_t first) {
    std::vector<Attended> held;
    for (std::size_t i = first; i + 1 < row.size(); i += 2) held.push_back({at(row[i]), at(row[i + 1])});
    return held;
}

// a row: length, capacity, token, then the addresses of each layer's keys and values; whether what is rounded of each is finite
std::vector<bool> run(Tape& tape, const std::vector<Numbers>& rows, const std::string& isa, int threads) {
    std::vector<std::vector<Attended>> held;
    std::vector<Row> taken;
    for (const Numbers& row : rows) held.push_back(attended(row, 3));
    for (std::size_t t = 0; t < rows.size(); ++t) taken.push_back({held[t].data(), rows[t][0], rows[t][1], rows[t][2]});
    const auto finite = std::make_unique<bool[]>(taken.size());
    std::fill_n(finite.get(), taken.size(), true);
    const Isa chosen = parse_isa(isa.c_str());
    {
        nb::gil_scoped_release release;
        tape.run(taken.data(), static_cast<int64_t>(taken.size()), finite.get(), chosen, threads);
    }
    return std::vector<bool>(finite.get(), finite.get() + taken.size());
}

// the first row, as `run` has it; the tokens; bytes of a core's caches
bool read(Tape& tape, const Numbers& first, const Numbers& tokens, int64_t l1, int64_t l2, const std::string& isa, int threads) {
    const std::vector<Attended> held = attended(first, 3);
    const Isa chosen = parse_isa(isa.c_str());
    nb::gil_scoped_release release;
    return tape.read({held.data(), first[0], first[1], first[2]}, tokens.data(), static_cast<int64_t>(tokens.size()), l1, l2, chosen, threads);
}

}  // namespace

void bind_tape(nb::module_& m) {
    nb::class_<Tape>(m, "Tape")
        .def("__init__", [](Tape* self, int64_t begin, int64_t bytes, int64_t stride) {
            new (self) Tape(OwnMemory{static_cast<uintptr_t>(begin), static_cast<uintptr_t>(bytes), stride});
        })
        .def("length", [](Tape& self, int64_t y) { self.add_length(static_cast<float*>(at(y))); })
        .def("lookup", &lookup)
        .def("elementwise", &elementwise)
        .def("multiply", &multiply)
        .def("attend", &attend)
        .def("run", &run)
        .def("read", &read);
}

}  // namespace dither
