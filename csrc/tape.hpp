// A step of a model as a list of instructions on memory that stays where it is: what torch did to make one token's scores, op by op, done again without
// torch (dither/quant/recording.py records it). An instruction is one of
//     a length                  y = how many tokens are before this one
//     a look-up                 y = row `token` or row `length` of a table, packed (dequantize.hpp) or dense
//     a function of elements    y = f(a, b), each with strides of its own, rounded to the type that y is stored in
//     a sum or mean of rows     y[i, j, k] = sum_l a[i, j, k, l]
//     products                  one row x with several matrices, packed (packed_matmul.hpp), packed for x rounded to integers (int8_matmul.hpp) or dense
//     attention                 one query a head over the keys and values so far, to which this token's are added first
// Several rows, each a token of a sequence of its own, may be run at once: each has memory of its own, only products read weights once for all of them,
// and a row's numbers do not depend on the others. Many tokens of one sequence may be read at once (tape_prompt.cpp), by the products and the attention of
// prompts, whose sums go in another order.
// Elements are float32 or bfloat16 in memory and float32 in registers. The list runs in one parallel region: what is wide is cut by rows or heads, so
// numbers do not depend on the number of threads; the rest is one thread's.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu.hpp"
#include "int8_matmul.hpp"
#include "packed_matmul.hpp"

namespace dither {

enum class Element : int64_t { float32, bfloat16 };

enum class Function : int64_t {  // the numbers are those of dither/kernels/tape.py
    copy, add, sub, mul, div,    // of a and b
    neg, silu, sigmoid, relu, gelu, gelu_tanh, exp, tanh, sin, cos, sqrt, rsqrt, reciprocal, pow,  // of a; pow: the constant's power
    sum, mean                    // over the last axis of a
};

struct Place {
    void* at;
    Element type;
    int64_t stride[4];  // in elements; 0 where an axis is repeated
};

struct Elementwise {
    Function function;
    bool constant;  // b is the number `value`
    float value;
    int64_t size[4];  // of y, and of a for sum and mean; the last is the innermost
    Place y, a, b;
};

struct Dense {
    int64_t rows, columns;
    Element type;
    const void* weight;  // [O, I]
};

struct Lookup {
    bool by_length, packed;  // by the token's place instead of its number
    PackedWeights codes;
    Dense dense;
    void* y;
    Element y_type;  // that of a dense table
};

// y = x W^T; of the matrices one is there
struct Product {
    enum Kind { plain, packed, rounded } kind;
    Dense dense;
    PackedMatmul codes;
    Int8Matmul integers;
    void* y;
    Element y_type;
};

struct Products {
    const void* x;
    Element x_type;
    int64_t columns;
    std::vector<Product> of;
};

struct Head {  // strides of [heads, features]
    const void* at;
    int64_t head, feature;
};

struct Attend {
    int64_t layer, heads, groups, width, value_width;
    float scale;
    Element type;  // of all
    Head q, k, v;
    void* y;
    int64_t y_head;  // features lie next to each other
};

inline constexpr int64_t key_panel = 16, heads_at_once = 4;

// A layer's keys and values so far, in the type of `Attend`. Sixteen keys lie side by side, feature by feature: [G, capacity / 16, width, 16]; values
// lie as they are: [G, capacity, value_width].
struct Attended {
    void *keys, *values;
};

// A token that is run, and its sequence.
struct Row {
    const Attended* layers;  // by the layer of `Attend`
    int64_t length, capacity, token;  // tokens before this one, below `capacity`, a multiple of `key_panel`; this one's number
};

// Memory that each row has for itself. Instructions name that of row 0; row t's lies t strides behind, and what lies elsewhere is one for all.
struct OwnMemory {
    uintptr_t begin = 0, bytes = 0;
    int64_t stride = 0, first = 0;  // which row of the memory is row 0 of what is run

    bool holds(const void* at) const { return reinterpret_cast<uintptr_t>(at) - begin < bytes; }
    void* of(const void* at, int64_t row) const {
        return reinterpret_cast<void*>(reinterpret_cast<uintptr_t>(at) + (holds(at) ? static_cast<uintptr_t>((first + row) * stride) : 0));
    }
};

struct TapeKernel {
    void (*elementwise)(const Elementwise&);
    void (*dense)(const Dense&, const float* x, int64_t tokens, int64_t first, int64_t last, float* y);  // x [tokens, columns], y [tokens, rows]
    void (*widen)(const void* from, Element type, int64_t count, float* to);
    void (*narrow)(const float* from, Element type, int64_t count, void* to);
    // up to `heads_at_once` heads of one group; `logits`: [heads_at_once, stride] of the thread's own, stride a multiple of `key_panel`
    void (*attend)(const Attend&, int64_t head, int64_t count, const void* keys, const void* values, int64_t length, float* logits, int64_t stride);
};

TapeKernel tape_kernel_scalar();
#ifdef DITHER_X86
TapeKernel tape_kernel_avx2();
TapeKernel tape_kernel_avx512();
#endif

class Tape {
public:
    explicit Tape(OwnMemory own) : own(own) {}
    void add_length(float* y);
    void add(const Lookup&);
    void add(const Elementwise&);
    void add(const Products&);
    void add(const Attend&);

    // Not by two threads at once. Throws std::out_of_range where a table has no such row. `finite`, of each row: becomes false where an x that was
    // rounded is not; its products are NaN.
    void run(const Row* rows, int64_t count, bool* finite, Isa isa, int threads);

    // `count` tokens behind the first, of its sequence. From the last attention on, whose keys and values are those of all, what there is to do is done for
    // the last of them alone; its memory is row `count` - 1. l1, l2: bytes of a core's caches. Whether every x that was rounded is finite.
    bool read(const Row& first, const int64_t* tokens, int64_t count, int64_t l1, int64_t l2, Isa isa, int threads);

private:
    struct Step {
        enum { length, lookup, elementwise, products, attend } kind;
        std::size_t index;
        bool is_narrow() const { return kind < products; }
    };
    void check(const Row&) const;
    int64_t most_groups() const;  // of looked-up rows
    void narrow(const Step&, const Row&, int64_t place, const OwnMemory&, const TapeKernel&, float* scales, Isa) const;
    void run(const Row* rows, int64_t count, const OwnMemory&, std::size_t from, std::size_t to, bool* finite, Isa isa, int threads);

    OwnMemory own;
    std::vector<Step> steps;
    std::vector<float*> lengths;
    std::vector<Lookup> lookups;
    std::vector<Elementwise> functions;
    std::vector<Products> products;
    std::vector<Attend> attentions;
};

}  // namespace dither
