// Products of packed rows (packing.hpp) with rows of x that are rounded to integers when they arrive, in int32. With one grid a row of x,
//     x_hat[t, i] = step[t] (q[t, i] - point[t]),  q of a signed byte
//     y[t, o] = step[t] sum_g scale[o, g] E[t, o, g],  E = sum_{i in g} (code[o, i] - zero[o, g]) (q[t, i] - point[t]),  g = i / group
// E is an integer and exact, however it is summed:
//     E = (sum code q  -  zero sum q)  -  point (sum code - zero count)
// The sum over groups is a chain of float32 FMAs in their order. So a row of y is the same to the last bit for any number of rows, of threads, and
// in both ways of multiplying: `few` reads codes into registers once for up to `few_tokens` rows, `many` unpacks a panel of them to bytes first.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cpu.hpp"
#include "packed_matmul.hpp"
#include "round.hpp"

namespace dither {

enum class TokenGrid { symmetric, extremum, asymmetric };  // see int8_round.hpp

enum class Int8Way { best, vectors, emulated };  // tests ask for what other processors take: no tiles, or tiles in plain C++

struct Int8Matmul {
    int64_t rows, columns, group, groups, tokens;  // O, I, g, G = ceil(I / g), T
    int bits;
    const uint8_t* packed;  // [O, packed_stride(I, bits)]
    const void* scale;      // [O, G]
    ScaleStorage scale_type;
    const uint8_t* zero;  // [O, G], or nullptr: `middle` for all
    int32_t middle;
    const void* x;          // [T, I], a row `x_next` numbers behind another
    int64_t x_next;
    bool bfloat16;  // the type of x, else float32
    TokenGrid grid;
    float divisor;            // the step is the range of a row over this
    float lowest, highest;    // of q, for symmetric grids
    int32_t input_middle;     // of the codes of x: asymmetric ones are stored less this
    ScaleType step_type;
    float* y;   // [T, O], of `few`
    void* out;  // [T, O], of `many`, in the type of x, a row `out_next` numbers behind another
    int64_t out_next;
    Int8Way way;

    // made by `int8_matmul` or `FewInt8`
    int64_t padded;    // bytes of q that a group takes; zeros behind its own
    int64_t q_stride;  // bytes of q that a row takes
    int8_t* q;         // [T, q_stride], and for asymmetric grids a last row of ones
    int32_t* sums;     // [T, G], of q over each group; below the ones: how many there are
    float* steps;      // [T]; NaN for rows that hold NaN or inf
    int32_t* points;   // [T]
    void* ready;       // of one row: q as `Int8Row` wants it
    bool paired;       // `many`, where the sums of a group fit 16 bits: `sums` of tokens have the point in their upper half

    bool pointed() const { return grid == TokenGrid::asymmetric; }
    int64_t inputs() const { return tokens + pointed(); }  // rows of q
};

inline constexpr int64_t few_tokens = 8;
inline constexpr int64_t paired_columns = 128;  // sums of so many codes less zero points fit 16 bits, as do those of q
inline constexpr int64_t few_outputs = 16;  // what `few` takes at once divides this

// Products of one row with more speed than `few` has, for some widths and groups.
struct Int8Row {
    std::size_t (*ready_bytes)(const Int8Matmul&);
    void (*prepare)(const Int8Matmul&);  // fills `ready`
    void (*rows)(const Int8Matmul&, int64_t first, int64_t last);  // outputs; `first` a multiple of `few_outputs`
};

struct Int8Kernel {
    int lanes, panel;  // columns of q in a step of `few` over four; outputs that `many` takes at once
    int depth;         // columns that it pads groups to a multiple of
    Int8Row (*row)(const Int8Matmul&);  // nullptr in it, or instead of it: there is none
    bool (*round)(const Int8Matmul&, int64_t token);  // fills the token's q, sums, step, point; false where x is not finite
    std::size_t (*few_bytes)(const Int8Matmul&);
    void (*few)(const Int8Matmul&, int64_t first, int64_t last, char* scratch);  // outputs; `first` a multiple of `lanes`
    std::size_t (*many_bytes)(const Int8Matmul&);
    void (*many)(const Int8Matmul&, int64_t output, int64_t first, int64_t last, char* scratch);  // a panel from `output` on; tokens
};

Int8Kernel int8_kernel_scalar();
#ifdef DITHER_X86
Int8Kernel int8_kernel_avx2();
Int8Kernel int8_kernel_avx512();    // has_avx512_vnni() and has_avx512_vbmi()
Int8Kernel int8_kernel_amx();       // and has_amx_int8()
Int8Kernel int8_kernel_emulated();  // the same in plain C++, but for what AVX-512 does
Int8Row int8_row_avx512vnni(const Int8Matmul&);
#endif

// The product of up to `few_tokens` rows in parts, for threads of the caller's own, and for several matrices that one x meets: what `round` gives is the
// same for all of a width, a group and a grid.
class FewInt8 {
public:
    FewInt8(const Int8Matmul& p, Isa isa);

    std::size_t input_bytes() const;    // of x rounded
    std::size_t scratch_bytes() const;  // of a thread
    void place(char* memory);           // where x rounded is, or will be
    bool round() const;                 // whether all of x is finite
    // `p` is the matrix given or one that is like it; outputs, `first` a multiple of `few_outputs`
    void multiply(const Int8Matmul& p, int64_t first, int64_t last, char* scratch) const;

private:
    Int8Matmul p_;
    Int8Kernel kernel_;
    Int8Row row_{};
};

// The same for any number of rows at once: `multiply` fills `out` of matrices that are like the one given.
class ManyInt8 {
public:
    ManyInt8(const Int8Matmul& p, Isa isa);

    std::size_t input_bytes() const;
    void place(char* memory);
    bool round(int threads);
    void multiply(Int8Matmul* of, int64_t count, int threads) const;  // which learn where x is

private:
    Int8Matmul p_;
    Int8Kernel kernel_;
};

// Fills `out`. Whether all of x is finite; rows that are not become NaN.
bool int8_matmul(Int8Matmul, Isa isa, int threads);

}  // namespace dither
