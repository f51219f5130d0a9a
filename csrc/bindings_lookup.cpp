// codebook_matmul.hpp and partial_matmul.hpp for Python. Called for every layer and token, so memory comes as addresses. Shapes, types and density are
// checked in dither/kernels/codebook_matmul.py and partial_matmul.py, which hold the tensors.
#include "bindings.hpp"

#include "codebook_matmul.hpp"
#include "partial_matmul.hpp"

namespace dither {

namespace {

template <class T>
const T* at(uintptr_t address) { return reinterpret_cast<const T*>(address); }

// mask, codes, offsets: 0 for none; rest: bits of a salient code without its top one
void bound_partial_matmul(int64_t rows, int64_t columns, int64_t group, int rest, uintptr_t mask, uintptr_t plane, uintptr_t low, uintptr_t high,
                          uintptr_t codes, int64_t code_bytes, uintptr_t offsets, uintptr_t scale, uintptr_t zero, uintptr_t x, int64_t tokens,
                          uintptr_t y, const char* isa, int threads) {
    PartialMatmul p{};
    p.weights = {rows, columns, group, (columns + group - 1) / group, rest, at<uint8_t>(mask), at<uint8_t>(plane), at<float>(low), at<float>(high),
                 at<uint8_t>(codes), code_bytes, at<uint32_t>(offsets), at<float>(scale), at<float>(zero), nullptr, false};
    p.tokens = tokens;
    p.x = at<float>(x);
    p.y = reinterpret_cast<float*>(y);
    const Isa chosen = parse_isa(isa);
    nb::gil_scoped_release release;
    partial_matmul(p, chosen, threads);
}

// residuals, group, place, scale, bias: 0 for none; `add`: to what y holds
void bound_codebook_matmul(int64_t rows, int64_t columns, int64_t count, int64_t v, int bits, int main_bits, uintptr_t packed, int64_t stride,
                           int64_t width, uintptr_t centroids, uintptr_t residuals, uintptr_t group, uintptr_t place, uintptr_t scale, uintptr_t bias,
                           uintptr_t x, int64_t tokens, bool add, uintptr_t y, const char* isa, int threads) {
    const CodebookMatmul p{rows, columns, count, v, bits, main_bits, at<uint8_t>(packed), stride, width, at<float>(centroids), at<float>(residuals),
                           at<uint8_t>(group), at<int32_t>(place), at<float>(scale), at<float>(bias), tokens, at<float>(x), add,
                           reinterpret_cast<float*>(y), nullptr, nullptr};
    const Isa chosen = parse_isa(isa);
    nb::gil_scoped_release release;
    codebook_matmul(p, chosen, threads);
}

}  // namespace

void bind_lookup(nb::module_& m) {
    m.def("partial_matmul", &bound_partial_matmul);
    m.def("codebook_matmul", &bound_codebook_matmul);
}

}  // namespace dither
