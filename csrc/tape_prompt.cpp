// Many tokens of one sequence at once, as when a model reads a prompt: each is a row with memory of its own. What is narrow goes row by row, all of it up to
// the next product, so that a row's memory stays in the first cache; products and attention are those of prompts, and have threads of their own.
#include <algorithm>
#include <memory>
#include <vector>

#include "attention.hpp"
#include "packed_gemm.hpp"
#include "tape_run.hpp"

#ifdef _OPENMP
#include <omp.h>
#endif

namespace dither {

namespace {

constexpr int64_t rows_at_once = few_tokens;  // where products are not those of prompts

int thread_number() {
#ifdef _OPENMP
    return omp_get_thread_num();
#else
    return 0;
#endif
}

int threads_here() {
#ifdef _OPENMP
    return omp_get_num_threads();
#else
    return 1;
#endif
}

struct Prompt {
    const Row* rows;
    int64_t count;
    OwnMemory own;
    int64_t l1, l2;
    Isa isa;
    int threads;

    // numbers from one row's to the next one's
    int64_t next(const void* at, Element type) const { return own.holds(at) ? own.stride / static_cast<int64_t>(bytes_of(type)) : 0; }
};

// A function of elements that goes from row to row.
class Moving {
public:
    Moving(const Elementwise& e, const OwnMemory& own, int64_t row)
        : at_(of_row(e, own, row)), y_(own.holds(e.y.at) ? own.stride : 0), a_(own.holds(e.a.at) ? own.stride : 0), b_(own.holds(e.b.at) ? own.stride : 0) {}

    void run(const TapeKernel& kernel) {
        kernel.elementwise(at_);
        at_.y.at = static_cast<char*>(at_.y.at) + y_;
        at_.a.at = static_cast<char*>(at_.a.at) + a_;
        at_.b.at = static_cast<char*>(at_.b.at) + b_;
    }

private:
    Elementwise at_;
    int64_t y_, a_, b_;
};

// Whether there are products of prompts for all of these.
bool are_of_prompts(const Products& p) {
    return std::all_of(p.of.begin(), p.of.end(), [&](const Product& one) { return one.kind != Product::plain && one.y_type == p.x_type; });
}

void multiply_packed(const Product& one, const Products& p, const Prompt& prompt) {
    PackedGemm g{};
    static_cast<PackedWeights&>(g) = one.codes;
    g.tokens = prompt.count;
    g.x = prompt.own.of(p.x, 0), g.x_next = prompt.next(p.x, p.x_type);
    g.y = prompt.own.of(one.y, 0), g.y_next = prompt.next(one.y, one.y_type);
    g.bfloat16 = p.x_type == Element::bfloat16;
    g.l1 = prompt.l1, g.l2 = prompt.l2;
    packed_gemm(g, prompt.isa, prompt.threads);
}

// Whether x is finite. Products that round x alike share it rounded.
bool multiply_rounded(const Product* of, const Product* end, const Products& p, const Prompt& prompt) {
    Int8Matmul like = of->integers;
    like.tokens = prompt.count;
    like.x = prompt.own.of(p.x, 0), like.x_next = prompt.next(p.x, p.x_type);
    ManyInt8 many(like, prompt.isa);
    const Scratch memory = allocate(many.input_bytes());
    many.place(memory.get());
    const bool finite = many.round(prompt.threads);
    std::vector<Int8Matmul> matrices;
    for (; of != end; ++of) {
        Int8Matmul& one = matrices.emplace_back(of->integers);
        one.out = prompt.own.of(of->y, 0), one.out_next = prompt.next(of->y, of->y_type);
    }
    many.multiply(matrices.data(), static_cast<int64_t>(matrices.size()), prompt.threads);
    return finite;
}

bool multiply(const Products& p, const Prompt& prompt) {
    bool finite = true;
    const Product* const end = p.of.data() + p.of.size();
    for (const Product *of = p.of.data(), *alike; of != end; of = alike) {
        alike = end_of_alike(of, end);
        if (of->kind == Product::rounded) finite = multiply_rounded(of, alike, p, prompt) && finite;
        else
            for (; of != alike; ++of) multiply_packed(*of, p, prompt);
    }
    return finite;
}

// By the kernel for calibration and prompts, where the processor has it and q is as it wants it.
bool attends_at_once(const Attend& p, const Prompt& prompt) {
    return prompt.isa == Isa::avx512 && has_avx512_bf16() && p.type == Element::bfloat16 && p.width % 2 == 0 && p.q.feature == 1;
}

void attend_at_once(const Attend& p, const Prompt& prompt) {
    const Row& first = prompt.rows[0];
    const Attended& layer = first.layers[p.layer];
    AttentionProblem a{};
    a.batch = 1, a.heads = p.heads, a.groups = p.groups, a.length = prompt.count, a.width = p.width, a.value_width = p.value_width;
    a.before = first.length;
    a.scale = p.scale;
    a.q = static_cast<const uint16_t*>(prompt.own.of(p.q.at, 0));
    a.q_stride = {0, p.q.head, prompt.next(p.q.at, p.type)};
    a.k = static_cast<const uint16_t*>(layer.keys);
    a.paneled = true;
    a.k_stride = {0, first.capacity * p.width, key_panel * p.width};
    a.v = static_cast<const uint16_t*>(layer.values);
    a.v_stride = {0, first.capacity * p.value_width, p.value_width};
    a.out = static_cast<uint16_t*>(prompt.own.of(p.y, 0));
    a.out_stride = {0, p.y_head, prompt.next(p.y, p.type)};
    attention(a, prompt.threads);
}

// A query after the other, as a step has it.
void attend_by_rows(const Attend& p, const Prompt& prompt, const TapeKernel& kernel) {
    const int64_t stride = (prompt.rows[prompt.count - 1].length / key_panel + 1) * key_panel, shared = p.heads / p.groups;
    const std::size_t each = round_up(sizeof(float) * heads_at_once * stride);
    const Scratch logits = allocate(each * prompt.threads);
#pragma omp parallel for schedule(dynamic, 4) num_threads(prompt.threads)
    for (int64_t t = 0; t < prompt.count; ++t) {
        const Row& row = prompt.rows[t];
        const Attended& layer = row.layers[p.layer];
        const Attend own = of_row(p, prompt.own, t);
        for (int64_t head = 0, count; head < p.heads; head += count) {
            const int64_t group = head / shared;
            count = std::min(heads_at_once, (group + 1) * shared - head);
            const std::size_t before = bytes_of(p.type) * group * row.capacity;
            kernel.attend(own, head, count, static_cast<const char*>(layer.keys) + before * p.width,
                          static_cast<const char*>(layer.values) + before * p.value_width, row.length + 1,
                          reinterpret_cast<float*>(logits.get() + each * thread_number()), stride);
        }
    }
}

void append_all(const Attend& p, const Prompt& prompt) {
#pragma omp parallel for schedule(static) num_threads(prompt.threads)
    for (int64_t t = 0; t < prompt.count; ++t) append(of_row(p, prompt.own, t), prompt.rows[t]);
}

void attend(const Attend& p, const Prompt& prompt, const TapeKernel& kernel) {
    append_all(p, prompt);
    if (attends_at_once(p, prompt)) attend_at_once(p, prompt);
    else attend_by_rows(p, prompt, kernel);
}

}  // namespace

bool Tape::read(const Row& first, const int64_t* tokens, int64_t count, int64_t l1, int64_t l2, Isa isa, [[maybe_unused]] int threads) {
    threads = std::max(threads, 1);
#ifndef _OPENMP
    threads = 1;
#endif
    std::vector<Row> rows(count, first);
    for (int64_t t = 0; t < count; ++t) {
        rows[t].length += t, rows[t].token = tokens[t];
        check(rows[t]);
    }
    std::size_t alone = steps.size();  // from the last attention on
    while (alone > 0 && steps[alone - 1].kind != Step::attend) --alone;
    if (alone > 0) --alone;
    const Prompt prompt{rows.data(), count, own, l1, l2, isa, threads};
    const TapeKernel kernel = tape_kernel(isa);
    const std::size_t scales_each = round_up(2 * sizeof(float) * (most_groups() + 32));
    const Scratch scales = allocate(scales_each * threads);
    const auto finite = std::make_unique<bool[]>(count);
    std::fill_n(finite.get(), count, true);
    bool all_finite = true;
    for (std::size_t s = 0; s < alone;) {
        const Step& step = steps[s];
        std::size_t end = s + 1;
        if (step.is_narrow()) {
            while (end < alone && steps[end].is_narrow()) ++end;
#pragma omp parallel num_threads(threads)
            {
                const int thread = thread_number();
                const Team team{thread, threads_here(), nullptr};
                const int64_t begin = team.first(count), stop = team.last(count);
                std::vector<Moving> moving;
                for (std::size_t i = s; i < end; ++i)
                    if (steps[i].kind == Step::elementwise) moving.emplace_back(functions[steps[i].index], own, begin);
                for (int64_t t = begin; t < stop; ++t) {
                    auto next = moving.begin();
                    for (std::size_t i = s; i < end; ++i) {
                        if (steps[i].kind == Step::elementwise) (next++)->run(kernel);
                        else narrow(steps[i], rows[t], t, own, kernel, reinterpret_cast<float*>(scales.get() + scales_each * thread), isa);
                    }
                }
            }
        } else if (step.kind == Step::attend) {
            attend(attentions[step.index], prompt, kernel);
        } else if (are_of_prompts(products[step.index])) {
            all_finite = multiply(products[step.index], prompt) && all_finite;
        } else {
            for (int64_t t = 0; t < count; t += rows_at_once) {
                OwnMemory memory = own;
                memory.first = t;
                run(&rows[t], std::min(rows_at_once, count - t), memory, s, end, finite.get() + t, isa, threads);
            }
        }
        s = end;
    }
    if (alone < steps.size() && steps[alone].kind == Step::attend) append_all(attentions[steps[alone].index], prompt);
    OwnMemory memory = own;
    memory.first = count - 1;
    run(&rows[count - 1], 1, memory, alone, steps.size(), finite.get() + count - 1, isa, threads);
    return all_finite && std::all_of(finite.get(), finite.get() + count, [](bool each) { return each; });
}

}  // namespace dither
