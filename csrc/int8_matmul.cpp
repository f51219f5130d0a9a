#include "int8_matmul.hpp"

#include <algorithm>
#include <cstring>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "bfloat16.hpp"
#include "scratch.hpp"

namespace dither {

namespace {

Int8Kernel choose([[maybe_unused]] Int8Way way, Isa isa) {
    switch (isa) {
#ifdef DITHER_X86
        case Isa::avx512:
            if (!has_avx512_vnni() || !has_avx512_vbmi()) return int8_kernel_avx2();
            if (way == Int8Way::emulated) return int8_kernel_emulated();
            return way == Int8Way::best && has_amx_int8() ? int8_kernel_amx() : int8_kernel_avx512();
        case Isa::avx2: return int8_kernel_avx2();
#endif
        default: return int8_kernel_scalar();
    }
}

int64_t multiple(int64_t n, int64_t of) { return (n + of - 1) / of * of; }

// Behind the tokens: what gives sums of codes.
void add_ones(const Int8Matmul& p) {
    int8_t* const q = p.q + p.tokens * p.q_stride;
    std::memset(q, 0, p.q_stride);
    for (int64_t g = 0; g < p.groups; ++g) {
        const int64_t count = std::min(p.group, p.columns - g * p.group);
        std::memset(q + g * p.padded, 1, count);
        p.sums[p.tokens * p.groups + g] = static_cast<int32_t>(count);
    }
}

// Where the parts of what is made of x lie: offsets in one piece of memory.
struct Inputs {
    std::size_t q = 0, sums, steps, points, ready, bytes;

    Inputs(const Int8Matmul& p, std::size_t ready_bytes) {
        sums = q + round_up(p.inputs() * p.q_stride);
        steps = sums + round_up(sizeof(int32_t) * p.inputs() * p.groups);
        points = steps + round_up(sizeof(float) * p.tokens);
        ready = points + round_up(sizeof(int32_t) * p.tokens);
        bytes = ready + round_up(ready_bytes);
    }
    void place(Int8Matmul& p, char* memory) const {
        p.q = reinterpret_cast<int8_t*>(memory + q);
        p.sums = reinterpret_cast<int32_t*>(memory + sums);
        p.steps = reinterpret_cast<float*>(memory + steps);
        p.points = reinterpret_cast<int32_t*>(memory + points);
        p.ready = memory + ready;
    }
};

int64_t width_of(const Int8Matmul& p) { return std::min(p.group, p.columns); }

Int8Matmul with_inputs(Int8Matmul p, const Int8Matmul& like) {
    p.tokens = like.tokens, p.padded = like.padded, p.q_stride = like.q_stride, p.paired = like.paired;
    p.q = like.q, p.sums = like.sums, p.steps = like.steps, p.points = like.points, p.ready = like.ready;
    return p;
}

void multiply_few(const Int8Matmul& p, const FewInt8& few, int threads) {
    const int64_t tiles = (p.rows + few_outputs - 1) / few_outputs;
    threads = static_cast<int>(std::clamp<int64_t>(threads, 1, tiles));
    const std::size_t own = round_up(few.scratch_bytes());
    const Scratch scratch = allocate(own * threads);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int t = 0; t < threads; ++t) {
        const int64_t first = tiles * t / threads * few_outputs, last = tiles * (t + 1) / threads * few_outputs;
        few.multiply(p, first, std::min(last, p.rows), scratch.get() + own * t);
    }
}

// In how many parts to cut tokens, so that threads have work for equally long; each part unpacks its panel again.
int64_t parts_of(int64_t tokens, int64_t panels, int64_t threads) {
    constexpr int64_t worth = 64, unpacking = 16;  // tokens: of a part at the least; that take as long as unpacking a panel
    int64_t best = 1, least = INT64_MAX;
    for (int64_t parts = 1; parts == 1 || parts <= std::min(tokens / worth, 4 * threads); ++parts) {
        const int64_t time = (panels * parts + threads - 1) / threads * ((tokens + parts - 1) / parts + unpacking);
        if (time < least) best = parts, least = time;
    }
    return best;
}

// Matrices that one x meets, as if they were one.
void multiply_many(const Int8Matmul* of, int64_t count, const Int8Kernel& kernel, int threads) {
    const auto panels_of = [&](const Int8Matmul& p) { return (p.rows + kernel.panel - 1) / kernel.panel; };
    int64_t panels = 0;
    std::size_t own = 0;
    for (int64_t i = 0; i < count; ++i) panels += panels_of(of[i]), own = std::max(own, round_up(kernel.many_bytes(of[i])));
    const int64_t tokens = of[0].tokens, parts = parts_of(tokens, panels, threads);
    const int64_t length = multiple((tokens + parts - 1) / parts, kernel.depth > 4 ? 32 : 12), pieces = threads == 1 ? 1 : (tokens + length - 1) / length;
    const Scratch scratch = allocate(own * threads);
    char* const base = scratch.get();
#pragma omp parallel num_threads(threads)
    {
#ifdef _OPENMP
        char* const mine = base + own * omp_get_thread_num();
#else
        char* const mine = base;
#endif
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < panels * pieces; ++task) {
            const int64_t first = task % pieces * length, last = pieces == 1 ? tokens : std::min(first + length, tokens);
            int64_t panel = task / pieces;
            const Int8Matmul* p = of;
            for (; panel >= panels_of(*p); ++p) panel -= panels_of(*p);
            kernel.many(*p, panel * kernel.panel, first, last, mine);
        }
    }
}

}  // namespace

FewInt8::FewInt8(const Int8Matmul& p, Isa isa) : p_(p), kernel_(choose(p.way, isa)) {
    // steps of 4 lanes begin where a group does or hold several
    const int64_t step = 4 * kernel_.lanes, width = width_of(p);
    p_.padded = width < step && width % 16 == 0 && step % width == 0 ? width : multiple(width, step);
    p_.q_stride = multiple(p_.groups * p_.padded, step) + 4 * step;  // vectors are stored a little beyond the last group, and `Int8Row` reads more of them
    if (p.tokens == 1 && kernel_.row) row_ = kernel_.row(p_);
}

std::size_t FewInt8::input_bytes() const { return Inputs(p_, row_.rows ? row_.ready_bytes(p_) : 0).bytes; }

std::size_t FewInt8::scratch_bytes() const { return row_.rows ? 0 : kernel_.few_bytes(p_); }

void FewInt8::place(char* memory) { Inputs(p_, 0).place(p_, memory); }

bool FewInt8::round() const {
    bool finite = true;
    for (int64_t t = 0; t < p_.tokens; ++t) finite = kernel_.round(p_, t) && finite;
    if (row_.rows) row_.prepare(p_);
    else if (p_.pointed()) add_ones(p_);
    return finite;
}

void FewInt8::multiply(const Int8Matmul& p, int64_t first, int64_t last, char* scratch) const {
    const Int8Matmul own = with_inputs(p, p_);
    if (row_.rows) row_.rows(own, first, last);
    else kernel_.few(own, first, last, scratch);
}

ManyInt8::ManyInt8(const Int8Matmul& p, Isa isa) : p_(p), kernel_(choose(p.way, isa)) {
    p_.padded = multiple(width_of(p), kernel_.depth);
    p_.q_stride = multiple(p_.groups * p_.padded, 4 * kernel_.lanes) + 4 * kernel_.lanes;
    p_.paired = width_of(p) <= paired_columns;
}

std::size_t ManyInt8::input_bytes() const { return Inputs(p_, 0).bytes; }

void ManyInt8::place(char* memory) { Inputs(p_, 0).place(p_, memory); }

bool ManyInt8::round([[maybe_unused]] int threads) {
    bool finite = true;
#pragma omp parallel for schedule(static) num_threads(threads) reduction(&& : finite)
    for (int64_t t = 0; t < p_.tokens; ++t) {
        finite = kernel_.round(p_, t) && finite;
        for (int64_t g = 0; p_.paired && g < p_.groups; ++g) {
            int32_t& sum = p_.sums[t * p_.groups + g];
            sum = (sum & 0xffff) | static_cast<int32_t>(static_cast<uint32_t>(p_.points[t]) << 16);
        }
    }
    if (p_.pointed()) add_ones(p_);
    return finite;
}

void ManyInt8::multiply(Int8Matmul* of, int64_t count, int threads) const {
    for (int64_t i = 0; i < count; ++i) of[i] = with_inputs(of[i], p_);
    multiply_many(of, count, kernel_, threads);
}

bool int8_matmul(Int8Matmul p, Isa isa, [[maybe_unused]] int threads) {
    if (p.rows == 0 || p.tokens == 0) return true;
    if (p.tokens <= few_tokens) {
        FewInt8 few(p, isa);
        const Scratch memory = allocate(few.input_bytes());
        few.place(memory.get());
        const bool finite = few.round();
        const int64_t count = p.tokens * p.rows;
        const Scratch wide = allocate(p.bfloat16 ? sizeof(float) * count : 0);
        p.y = p.bfloat16 ? reinterpret_cast<float*>(wide.get()) : static_cast<float*>(p.out);
        multiply_few(p, few, threads);
        for (int64_t i = 0; p.bfloat16 && i < count; ++i) static_cast<uint16_t*>(p.out)[i] = to_bfloat16(p.y[i]);
        return finite;
    }
    ManyInt8 many(p, isa);
    const Scratch memory = allocate(many.input_bytes());
    many.place(memory.get());
    const bool finite = many.round(threads);
    many.multiply(&p, 1, threads);
    return finite;
}

}  // namespace dither
