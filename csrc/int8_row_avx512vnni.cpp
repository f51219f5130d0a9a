// One row of int8_matmul.hpp with codes of 2, 4 or 8 bits. A step is 64 bytes of a row of codes; digit k of all bytes becomes 64 codes by a shift and a
// mask, and q lies in that order, so that no code has to be brought to its column. A step's sums lie along the columns; those of four outputs are added within
// blocks of four lanes (`Int::sum4`), each of which lies in one group, and those of sixteen are then brought side by side, where zero points come off and the
// sum over groups goes on: exact integers until there, and then the same chain. Sixteen outputs go together all the time, so that memory is read evenly.
//
// With zero points of the input, q - point has nine bits and a sign: it is the sum of up to three signed bytes, of which a step has as many as it
// needs, mostly one. Without, it is q.
#include "fetch_avx512.hpp"
#include "int8_grid_avx512vbmi.hpp"
#include "packing.hpp"

namespace {

constexpr int64_t step_bytes = 64, most_parts = 3, outputs = dither::few_outputs;

inline Int dot(Int sum, __m512i codes, __m512i q) {
    asm("vpdpbusd %2, %1, %0" : "+v"(sum.v) : "v"(codes), "v"(q));
    return sum;
}

template <int bits>
struct Layout {
    static constexpr int digits = 8 / bits;
    static constexpr int64_t codes = step_bytes * digits;  // a step
    int64_t parts, steps, groups_a_step, steps_a_group;
    const int8_t* q;         // [step][part][digit][64]
    int32_t* offsets;        // [groups]: sums of q - point
    uint8_t* used;           // [step]: parts that are not zero

    explicit Layout(const dither::Int8Matmul& p)
        : parts(p.pointed() ? most_parts : 1),
          steps((p.columns + codes - 1) / codes),
          groups_a_step(p.groups > 1 && p.group < codes ? codes / p.group : 1),
          steps_a_group(p.groups > 1 && p.group >= codes ? p.group / codes : p.groups > 1 ? 1 : steps),
          q(static_cast<const int8_t*>(p.ready)),
          offsets(reinterpret_cast<int32_t*>(static_cast<char*>(p.ready) + steps * parts * codes)),
          used(reinterpret_cast<uint8_t*>(offsets + p.groups)) {}

    std::size_t bytes(const dither::Int8Matmul& p) const { return steps * (parts * codes + 1) + 4 * p.groups; }
};

template <int bits>
std::size_t ready_bytes(const dither::Int8Matmul& p) { return Layout<bits>(p).bytes(p); }

inline constexpr Turn<6, uint8_t> every_other_lane({1, 2, 3, 4, 5, 6}, 0);

// lanes 0, 2, 4, .. of a and b, or 1, 3, 5, ..
inline __m512i every_other(__m512i a, __m512i b, int first) { return _mm512_permutex2var_epi8(a, every_other_lane[first], b); }

template <int digits>
void spread(const __m512i (&from)[digits], int8_t* to) {
    if constexpr (digits == 1) {
        _mm512_storeu_si512(to, from[0]);
    } else if constexpr (digits == 2) {
        _mm512_storeu_si512(to, every_other(from[0], from[1], 0));
        _mm512_storeu_si512(to + 64, every_other(from[0], from[1], 1));
    } else {
        for (int first = 0; first < 2; ++first) {
            const __m512i a = every_other(from[0], from[1], first), b = every_other(from[2], from[3], first);
            _mm512_storeu_si512(to + 64 * first, every_other(a, b, 0));
            _mm512_storeu_si512(to + 64 * (first + 2), every_other(a, b, 1));
        }
    }
}

// q - point as bytes that are added: as much as one holds, then as much as another does
inline void split(__m512i q, int32_t point, __mmask64 there, __m512i (&part)[most_parts]) {
    const auto half = [&](__m256i some, __m512i (&to)[most_parts]) {
        __m512i left = _mm512_sub_epi16(_mm512_cvtepi8_epi16(some), _mm512_set1_epi16(static_cast<short>(point)));
        for (__m512i& each : to) {
            each = _mm512_min_epi16(_mm512_max_epi16(left, _mm512_set1_epi16(-128)), _mm512_set1_epi16(127));
            left = _mm512_sub_epi16(left, each);
        }
    };
    __m512i low[most_parts], high[most_parts];
    half(_mm512_castsi512_si256(q), low);
    half(_mm512_extracti64x4_epi64(q, 1), high);
    for (int i = 0; i < most_parts; ++i) {
        const __m512i both = _mm512_inserti64x4(_mm512_castsi256_si512(_mm512_cvtepi16_epi8(low[i])), _mm512_cvtepi16_epi8(high[i]), 1);
        part[i] = _mm512_maskz_mov_epi8(there, both);
    }
}

template <int bits>
void prepare(const dither::Int8Matmul& p) {
    using L = Layout<bits>;
    const L to(p);
    int8_t* at = static_cast<int8_t*>(p.ready);
    const int32_t point = p.points[0];
    for (int64_t s = 0; s < to.steps; ++s, at += to.parts * L::codes) {
        __m512i part[most_parts][L::digits];
        for (int d = 0; d < L::digits; ++d) {
            const int64_t i = s * L::codes + 64 * d, left = p.columns - i;
            const __m512i q = _mm512_loadu_si512(p.q + i);  // zeros behind the last
            if (!p.pointed()) {
                part[0][d] = q;
                continue;
            }
            __m512i own[most_parts];
            split(q, point, left >= 64 ? ~__mmask64{0} : left <= 0 ? 0 : (__mmask64{1} << left) - 1, own);
            for (int i = 0; i < most_parts; ++i) part[i][d] = own[i];
        }
        to.used[s] = 1;
        for (int i = 0; i < to.parts; ++i) {
            __m512i any = part[i][0];
            for (int d = 1; d < L::digits; ++d) any = _mm512_or_si512(any, part[i][d]);
            if (_mm512_test_epi8_mask(any, any)) to.used[s] = static_cast<uint8_t>(i + 1);
            spread<L::digits>(part[i], at + i * L::codes);
        }
    }
    for (int64_t g = 0; g < p.groups; ++g) {
        const int64_t count = g + 1 < p.groups ? p.group : p.columns - g * p.group;
        to.offsets[g] = p.sums[g] - point * static_cast<int32_t>(count);
    }
}

template <int bits, int k>
inline __m512i digit(__m512i codes) {
    if constexpr (bits == 8) return codes;
    return _mm512_and_si512(_mm512_srli_epi16(codes, bits * k), _mm512_set1_epi8((1 << bits) - 1));
}

// Four outputs' codes of a step with one part of q.
template <int bits, int k = 0>
inline void add_part(const __m512i (&codes)[4], const int8_t* q, Int (&sum)[4]) {
    if constexpr (k < 8 / bits) {
        const __m512i x = _mm512_loadu_si512(q + 64 * k);
#pragma GCC unroll 4
        for (int r = 0; r < 4; ++r) sum[r] = dot(sum[r], digit<bits, k>(codes[r]), x);
        add_part<bits, k + 1>(codes, q, sum);
    }
}

// Of four outputs, sums of steps first .. last.
template <int bits, bool pointed>
inline Int sums_of_four(const Layout<bits>& x, const uint8_t* const* rows, int64_t first, int64_t last, int64_t whole, __mmask64 rest, int64_t ahead) {
    using L = Layout<bits>;
    Int sum[4];
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r) sum[r] = Int::zero();
    for (int64_t s = first; s < last; ++s) {
        const int8_t* const q = x.q + s * (pointed ? most_parts : 1) * L::codes;
        __m512i codes[4];
#pragma GCC unroll 4
        for (int r = 0; r < 4; ++r) {
            const uint8_t* const from = rows[r] + s * step_bytes;
            codes[r] = s < whole ? _mm512_loadu_si512(from) : _mm512_maskz_loadu_epi8(rest, from);
            fetch(from + ahead);
        }
        add_part<bits>(codes, q, sum);
        if constexpr (pointed)
            for (int part = 1; part < x.used[s]; ++part) add_part<bits>(codes, q + part * L::codes, sum);
    }
    return Int::sum4(sum);
}

// What `grid_at` will want next, of rows of so many groups that they do not come at once.
inline void fetch_groups(const dither::Int8Matmul& p, int64_t o, int64_t g) {
    const int64_t bytes = bytes_of(p.scale_type);
    for (int64_t r = o; r < o + outputs; ++r) {
        fetch(static_cast<const char*>(p.scale) + (r * p.groups + g) * bytes);
        if (p.zero) fetch(p.zero + r * p.groups + g);
    }
}

template <int bits, bool pointed>
void sixteen(const dither::Int8Matmul& p, const Layout<bits>& x, int64_t o) {
    const int64_t stride = dither::packed_stride(p.columns, bits), whole = stride / step_bytes;
    const __mmask64 rest = (__mmask64{1} << stride % step_bytes) - 1;
    // some tiles on, or of long rows so far in each that what comes stays in the first cache
    const Ahead tiles(stride, outputs);
    const int64_t ahead = stride < 4096 ? tiles.bytes : 768;
    if (p.groups <= 16) fetch_grid(p, o + tiles.rows, outputs);
    const uint8_t* rows[outputs];
    for (int r = 0; r < outputs; ++r) rows[r] = p.packed + (o + r < p.rows ? o + r : p.rows - 1) * stride;
    SixteenGroups grid;
    F32 y = F32::set1(0);
    for (int64_t g = 0, s = 0; g < p.groups;) {
        grid_at(p, o, g, grid);
        if (p.groups > 16) fetch_groups(p, g + 16 < p.groups ? o : o + outputs, g + 16 < p.groups ? g + 16 : 0);
        const auto add = [&](Int of, int k) {  // the next group, the k-th of the sixteen
            const __m512i zero = _mm512_cvtepu8_epi32(_mm_load_si128(reinterpret_cast<const __m128i*>(grid.zeros[k])));
            of = of - Int{zero} * Int::set1(x.offsets[g++]);
            y = F32::fmadd(F32::load(grid.scales[k]), of.floats(), y);
        };
        for (int k = 0; k < 16 && g < p.groups;) {
            const int64_t last = s + x.steps_a_group < x.steps ? s + x.steps_a_group : x.steps;
            Int of[4];
#pragma GCC unroll 4
            for (int four = 0; four < 4; ++four) of[four] = sums_of_four<bits, pointed>(x, rows + 4 * four, s, last, whole, rest, ahead);
            s = last;
            Int::transpose_blocks(of);
            if (x.groups_a_step == 1) {
                add((of[0] + of[1]) + (of[2] + of[3]), k++);
            } else if (x.groups_a_step == 2) {
                add(of[0] + of[1], k++);
                if (g < p.groups) add(of[2] + of[3], k++);
            } else {
                for (int b = 0; b < 4 && g < p.groups; ++b) add(of[b], k++);
            }
        }
    }
    y = y * F32::set1(p.steps[0]);
    if (o + outputs <= p.rows) y.store(p.y + o);
    else store_first(p.y + o, y, p.rows - o);
}

template <int bits>
void rows(const dither::Int8Matmul& p, int64_t first, int64_t last) {
    const Layout<bits> x(p);
    for (int64_t o = first; o < last; o += outputs) {
        if (p.pointed()) sixteen<bits, true>(p, x, o);
        else sixteen<bits, false>(p, x, o);
    }
}

template <int bits>
dither::Int8Row row_if_it_fits(const dither::Int8Matmul& p) {
    const int64_t codes = Layout<bits>::codes;
    if (p.groups > 1 && p.group % codes != 0 && p.group != codes / 2 && p.group != codes / 4) return {};
    return {ready_bytes<bits>, prepare<bits>, rows<bits>};
}

}  // namespace

namespace dither {

Int8Row int8_row_avx512vnni(const Int8Matmul& p) {
    switch (p.bits) {
        case 2: return row_if_it_fits<2>(p);
        case 4: return row_if_it_fits<4>(p);
        case 8: return row_if_it_fits<8>(p);
        default: return {};
    }
}

}  // namespace dither
