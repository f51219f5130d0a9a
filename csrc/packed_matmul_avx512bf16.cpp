// Codes of 2, 4 and 8 bits without unpacking them. A vector of 64 bytes holds B = 512 / bits codes; each of its 32 lanes of 16 bits holds 16 / bits of
// them. Shifted right by k digits (a digit: a code of 2 or 4 bits, half a code of 8), the lane's lowest five bits index a table of bfloat16, whose upper
// half repeats the lower, so no mask is needed: permutexvar_epi16 gives digit k of all lanes as bfloat16 numbers, exactly, and vdpbf16ps multiplies
// them with x[lane's first code + k] and sums pairs of lanes. That is two instructions and a shift for 32 digits. x is brought into this order
// once a call; a float32 x as two bfloat16, x = hi + lo + O(2^-17 x).
#include <immintrin.h>

#include "bfloat16.hpp"
#include "packed_matmul_row.hpp"

namespace {

struct Layout {
    int codes;              // of a lane
    int64_t block, blocks;  // codes a vector, vectors a row
    explicit Layout(const dither::PackedMatmul& p) : codes(16 / p.bits), block(512 / p.bits), blocks((p.columns + block - 1) / block) {}
    int64_t vectors(const dither::PackedMatmul& p) const { return blocks * codes * (p.exact ? 2 : 1); }  // of x, for one token
};

// What all rows share, at the start of `ready`: the table of a digit (the high one of eight bits counts sixteenfold), and each lane's group.
struct Shared {
    alignas(64) uint16_t low[32], high[32];
    alignas(64) int32_t group_of[16];
};

int64_t ready_bytes(const dither::PackedMatmul& p) { return sizeof(Shared) + p.tokens * Layout(p).vectors(p) * 64; }

// Shared, then [token][block][code of a lane][hi, lo][32 lanes]
void prepare(const dither::PackedMatmul& p, void* ready) {
    const Layout layout(p);
    Shared& shared = *static_cast<Shared*>(ready);
    for (int d = 0; d < 32; ++d) {
        const int digit = p.bits == 2 ? d & 3 : d & 15;
        shared.low[d] = to_bfloat16(static_cast<float>(digit));
        shared.high[d] = to_bfloat16(static_cast<float>(16 * digit));
    }
    for (int lane = 0; lane < 16; ++lane) shared.group_of[lane] = static_cast<int32_t>(p.group >= layout.block ? 0 : lane * (32 / p.bits) / p.group);
    uint16_t* to = reinterpret_cast<uint16_t*>(&shared + 1);
    for (int64_t t = 0; t < p.tokens; ++t)
        for (int64_t b = 0; b < layout.blocks; ++b)
            for (int k = 0; k < layout.codes; ++k, to += p.exact ? 64 : 32)
                for (int lane = 0; lane < 32; ++lane) {
                    const int64_t i = b * layout.block + lane * layout.codes + k;
                    const float x = i < p.columns ? p.x[t * p.columns + i] : 0.0f;
                    to[lane] = to_bfloat16(x);
                    if (p.exact) to[32 + lane] = to_bfloat16(x - std::bit_cast<float>(static_cast<uint32_t>(to[lane]) << 16));
                }
}

// The row's scales, zeros behind the last, and each one's product with its zero point, which sixteen groups at a time take off.
void read_row(const dither::PackedMatmul& p, int64_t o, float* scales) {
    const int64_t first = o * p.groups;
    for (int64_t g = 0; g < p.groups; g += 16) {
        const __mmask16 some = static_cast<__mmask16>(p.groups - g >= 16 ? 0xffff : (1u << (p.groups - g)) - 1);
        __m512 s;
        switch (p.scale_type) {
            case dither::ScaleStorage::float32: s = _mm512_maskz_loadu_ps(some, static_cast<const float*>(p.scale) + first + g); break;
            case dither::ScaleStorage::float16:
                s = _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(some, static_cast<const uint16_t*>(p.scale) + first + g));
                break;
            default:
                s = _mm512_castsi512_ps(_mm512_slli_epi32(
                    _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(some, static_cast<const uint16_t*>(p.scale) + first + g)), 16));
        }
        _mm512_storeu_ps(scales + g, s);
    }
    _mm512_storeu_ps(scales + p.groups, _mm512_setzero_ps());
}

__m512 zeros_off(const dither::PackedMatmul& p, int64_t o, int64_t t, const float* scales, __m512 total) {
    for (int64_t g = 0; g < p.groups; g += 16) {
        const __mmask16 some = static_cast<__mmask16>(p.groups - g >= 16 ? 0xffff : (1u << (p.groups - g)) - 1);
        const __m512 zero = p.zero ? _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(some, p.zero + o * p.groups + g)))
                                   : _mm512_set1_ps(p.middle);
        const __m512 sums = _mm512_maskz_loadu_ps(some, p.sums + t * p.groups + g);
        total = _mm512_fnmadd_ps(_mm512_mul_ps(_mm512_maskz_loadu_ps(some, scales + g), zero), sums, total);
    }
    return total;
}

__m512bh as_bf16(__m512i x) { return reinterpret_cast<__m512bh>(x); }

// R rows on T tokens: what is loaded of x serves all rows, what is decoded of a row all tokens
template <int bits, bool exact, int R, int T>
void tile(const dither::PackedMatmul& p, const Layout& layout, int64_t o, int64_t t0, const float* scales, int64_t scales_next) {
    constexpr int digits = bits == 2 ? 8 : 4, width = bits == 2 ? 2 : 4, parts = exact ? 2 : 1;
    const Shared& shared = *static_cast<const Shared*>(p.ready);
    const __m512i low = _mm512_load_si512(shared.low), high = _mm512_load_si512(shared.high), group_of = _mm512_load_si512(shared.group_of);
    const int64_t bytes = dither::packed_stride(p.columns, bits), next = layout.vectors(p) * 32;  // from a row, a token, to the next
    const uint8_t* const from = p.packed + o * bytes;
    const uint16_t* x = reinterpret_cast<const uint16_t*>(&shared + 1) + t0 * next;
    __m512 total[R][T];
    for (int r = 0; r < R; ++r)
        for (int t = 0; t < T; ++t) total[r][t] = _mm512_setzero_ps();
    for (int64_t b = 0; b < layout.blocks; ++b, x += 32 * (16 / bits) * parts) {
        const int64_t left = bytes - 64 * b, group = b * layout.block / p.group;
        const __mmask64 there = left >= 64 ? ~__mmask64{0} : (__mmask64{1} << left) - 1;
        __m512i codes[R];
        __m512 sum[R][T];
        for (int r = 0; r < R; ++r) {
            codes[r] = _mm512_maskz_loadu_epi8(there, from + r * bytes + 64 * b);
            for (int t = 0; t < T; ++t) sum[r][t] = _mm512_setzero_ps();
        }
#pragma GCC unroll 8
        for (int k = 0; k < digits; ++k) {
            __m512bh values[R];
            for (int r = 0; r < R; ++r)
                values[r] = as_bf16(_mm512_permutexvar_epi16(_mm512_srli_epi16(codes[r], k * width), bits == 8 && k % 2 ? high : low));
            for (int t = 0; t < T; ++t)
                for (int part = 0; part < parts; ++part) {
                    const __m512bh input = as_bf16(_mm512_loadu_si512(x + t * next + 32 * ((bits == 8 ? k / 2 : k) * parts + part)));
                    for (int r = 0; r < R; ++r) sum[r][t] = _mm512_dpbf16_ps(sum[r][t], values[r], input);
                }
        }
        for (int r = 0; r < R; ++r) {
            const __m512 scale = _mm512_permutexvar_ps(group_of, _mm512_loadu_ps(scales + r * scales_next + group));
            for (int t = 0; t < T; ++t) total[r][t] = _mm512_fmadd_ps(scale, sum[r][t], total[r][t]);
        }
    }
    for (int r = 0; r < R; ++r)
        for (int t = 0; t < T; ++t)
            p.y[(t0 + t) * p.rows + o + r] = _mm512_reduce_add_ps(zeros_off(p, o + r, t0 + t, scales + r * scales_next, total[r][t]));
}

template <int bits, bool exact, int R>
void rows_of(const dither::PackedMatmul& p, const Layout& layout, int64_t o, float* scales) {
    const int64_t next = p.groups + 32;
    for (int r = 0; r < R; ++r) read_row(p, o + r, scales + r * next);
    int64_t t = 0;
    for (; t + 4 <= p.tokens; t += 4) tile<bits, exact, R, 4>(p, layout, o, t, scales, next);
    for (; t < p.tokens; ++t) tile<bits, exact, R, 1>(p, layout, o, t, scales, next);
}

template <int bits, bool exact>
void all_rows(const dither::PackedMatmul& p, int64_t first, int64_t last, float* scales) {
    const Layout layout(p);
    int64_t o = first;
    for (; o + 2 <= last; o += 2) rows_of<bits, exact, 2>(p, layout, o, scales);
    for (; o < last; ++o) rows_of<bits, exact, 1>(p, layout, o, scales);
}

void rows(const dither::PackedMatmul& p, int64_t first, int64_t last, float* scales) {
    switch (p.bits) {
        case 2: return p.exact ? all_rows<2, true>(p, first, last, scales) : all_rows<2, false>(p, first, last, scales);
        case 4: return p.exact ? all_rows<4, true>(p, first, last, scales) : all_rows<4, false>(p, first, last, scales);
        default: return p.exact ? all_rows<8, true>(p, first, last, scales) : all_rows<8, false>(p, first, last, scales);
    }
}

}  // namespace

namespace dither {

// Every 32-bit lane must lie in one group, and groups and vectors must divide one another.
bool packed_fits_avx512bf16(const PackedMatmul& p) {
    if (p.bits != 2 && p.bits != 4 && p.bits != 8) return false;
    const int64_t block = 512 / p.bits;
    return p.group >= p.columns || (p.group % (32 / p.bits) == 0 && (p.group % block == 0 || block % p.group == 0));
}

PackedKernel packed_kernel_avx512bf16() { return {ready_bytes, prepare, rows}; }

}  // namespace dither
