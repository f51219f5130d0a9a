// Causal attention O = softmax(scale Q K^T) V, query t seeing keys 0..before + t, in bfloat16 with float32 sums.
//
// Keys and values of a head are packed once into panels of 16 lanes whose lanes hold two bfloat16 each, as vdpbf16ps wants them: keys by pairs
// of features, values by pairs of keys. A task is a block of queries of one head: logits of a few rows at a time stay in registers over all
// features, a row's softmax runs over the second cache, and the products with the values again in registers. So a call reads Q, K, V and
// writes O once, in one parallel region; about T^2 (d + e) / 2 multiply-adds and T^2 / 2 exponentials a head.
//
// Only processors with AVX512_BF16 have this kernel; on others the torch reference runs (dither/kernels/attention_reference.py).
#pragma once

#include <cstdint>

namespace dither {

struct Strides {  // in numbers; features lie next to each other
    int64_t batch, head, token;
};

struct AttentionProblem {
    int64_t batch, heads, groups, length, width, value_width;  // length: of queries, T; width: even; groups divides heads
    int64_t before;                                            // keys and values before those of the first query
    float scale;
    const uint16_t *q, *k, *v;  // bfloat16: [B, H, T, d], [B, G, before + T, d], [B, G, before + T, e]
    bool paneled;               // k lies in panels of 16 keys, a feature of all side by side: a panel `k_stride.token` behind another
    Strides q_stride, k_stride, v_stride, out_stride;
    uint16_t* out;  // [B, H, T, e]

    int64_t keys() const { return before + length; }
};

// A head's keys and values as the kernel reads them, and a thread's own memory.
struct AttentionLayout {
    int64_t key_panels, value_panels, key_pairs;  // of 16 keys, of 16 features, of 2 keys
    int64_t key_lanes, value_lanes;               // 32-bit lanes of the packed keys and values of a head
    int64_t stride;                               // of a row of logits
};

inline constexpr int64_t attention_rows = 48, attention_tile = 6;  // queries of one task, and of those whose logits are held at a time
AttentionLayout attention_layout(const AttentionProblem&);

struct AttentionKernel {
    void (*pack)(const AttentionProblem&, const AttentionLayout&, int64_t batch, int64_t group, uint32_t* keys, uint32_t* values);
    // queries first .. first + rows - 1 of one head
    void (*attend)(const AttentionProblem&, const AttentionLayout&, int64_t batch, int64_t head, int64_t first, int64_t rows,
                   const uint32_t* keys, const uint32_t* values, float* logits, uint16_t* probabilities);
};

#ifdef DITHER_X86
AttentionKernel attention_kernel_avx512bf16();
#endif

// Throws std::runtime_error on processors without AVX512_BF16.
void attention(const AttentionProblem&, int threads);

}  // namespace dither
