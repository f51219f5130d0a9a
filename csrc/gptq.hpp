// GPTQ's column loop (Frantar et al., ICLR 2023, arXiv 2210.17323, section 3.3). Rows are independent problems:
//
//     for c = 0 .. I-1:   w_c = W_c - sum_{k < c} e_k U_kc;   q_c = nearest grid value;   e_c = (w_c - q_c) / U_cc
//
// This is the lazy-block loop with the updates of a column gathered when the column is reached ("left-looking"): W is read
// once, and each w_c is one chain of FMAs in the order of k. Results therefore depend neither on a block size nor on the
// number of threads, and AVX2 and AVX-512 agree bit for bit. Cost: O I^2 / 2 FMAs; memory: I^2 / 2 for the packed factor and
// (2 sizeof(T) + 1) x 2 lanes x I a thread.
#pragma once

#include <cstdint>

#include "cpu.hpp"

namespace dither {

enum class GridKind {
    affine,  // code = clip(rne(w / s) + z, 0, max),   value = s (code - z)
    offset,  // code = clip(rne((w - m) / s), 0, max), value = s code + m
    table,   // code of the table entry nearest to w / s, value = s entry
    mixed    // where binary: code = w >= threshold, value = low or high; elsewhere affine
};

template <class T>
struct GptqProblem {
    int64_t rows, columns, groups;  // O, I, G
    const T* weight;                // [O, I]
    const T* packed_factor;         // see pack_factor
    const T* scale;                 // [O, G]
    const T* shift;                 // [O, G]: z or m; unused by tables
    const int64_t* column_group;    // [I], each in [0, G)
    GridKind kind;
    T code_max;
    const T* table;              // [N] ascending
    const T* edges;              // [N - 1]: entry i + 1 is taken from edges[i] on
    const uint8_t* table_codes;  // [N]
    int64_t table_size;
    const T* levels;        // [O, G, 3]: threshold, low, high of the mixed grid's two levels
    const uint8_t* binary;  // [O, I]: 1 where it has two levels
    uint8_t* codes;  // [O, I]
    double* loss;    // [O]: sum of e^2 / 2
    T* errors;       // [O, I] or null
};

// Element (k, c) of panel p = c / panel sits at offset(p) + k panel + c % panel, k < (p + 1) panel: what the loop reads, in its order.
inline int64_t panel_offset(int64_t panel_index, int64_t panel) { return panel * panel * (panel_index * (panel_index + 1) / 2); }

// One tile of 2 x lanes rows. `scratch` is what tile_scratch says, 64-byte aligned.
template <class T>
using GptqTile = void (*)(const GptqProblem<T>&, int64_t first_row, char* scratch);

template <class T>
struct GptqKernel {
    GptqTile<T> tile;
    int64_t tile_rows, panel;
};

template <class T>
GptqKernel<T> gptq_kernel_scalar();
#ifdef DITHER_X86
template <class T>
GptqKernel<T> gptq_kernel_avx2();
template <class T>
GptqKernel<T> gptq_kernel_avx512();
#endif

// `problem.packed_factor` is filled in here from `factor [I, I]`.
template <class T>
void gptq(GptqProblem<T> problem, const T* factor, Isa isa, int threads);

}  // namespace dither
