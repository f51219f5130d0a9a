#include "tape.hpp"

#include <algorithm>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "dequantize.hpp"
#include "packing.hpp"
#include "tape_run.hpp"

namespace dither {

namespace {

int64_t row_of(const Lookup& p, const Row& row) { return p.by_length ? row.length : row.token; }

// `scales`: [2, groups]
void look_up(const Lookup& p, int64_t row, void* y, float* scales, Isa isa) {
    if (!p.packed) {
        const std::size_t bytes = bytes_of(p.y_type) * p.dense.columns;
        std::memcpy(y, static_cast<const char*>(p.dense.weight) + bytes * row, bytes);
        return;
    }
    const PackedWeights& w = p.codes;
    float* const zeros = scales + w.groups;
    for (int64_t g = 0; g < w.groups; ++g) {
        scales[g] = scale_at(w, row * w.groups + g);
        zeros[g] = zero_at(w, row * w.groups + g);
    }
    const DequantizeProblem one{1,        w.columns, w.group, w.groups, w.bits, w.packed + row * packed_stride(w.columns, w.bits),
                                w.values, scales,    zeros,   y,        p.y_type == Element::bfloat16};
    row_dequantizer(one, isa)(one, 0);
}

template <class Number>
void append_as(const Attend& p, const Attended& layer, int64_t length, int64_t capacity) {
    const auto copy = [&](const Head& from, int64_t group, int64_t width, void* to, int64_t first, int64_t step) {
        const Number* const own = static_cast<const Number*>(from.at) + group * from.head;
        Number* const at = static_cast<Number*>(to) + first;
        for (int64_t i = 0; i < width; ++i) at[i * step] = own[i * from.feature];
    };
    for (int64_t g = 0; g < p.groups; ++g) {
        copy(p.k, g, p.width, layer.keys, (g * capacity + length / key_panel * key_panel) * p.width + length % key_panel, key_panel);
        copy(p.v, g, p.value_width, layer.values, (g * capacity + length) * p.value_width, 1);
    }
}

// Every thread takes some heads of every row, as sequences are not equally long; who has one more differs from row to row.
void attend(const Attend& p, const Run& run) {
    const Team& team = run.team;
    for (int64_t t = 0; t < run.count; ++t)
        if (run.is_mine(t)) append(of_row(p, run.own, t), run.rows[t]);
    team.wait();
    for (int64_t t = 0; t < run.count; ++t) {
        const Row& row = run.rows[t];
        const Attended& layer = row.layers[p.layer];
        const Attend own = of_row(p, run.own, t);
        const Team part{static_cast<int>((team.thread + t) % team.threads), team.threads, team.meeting};
        const int64_t shared = p.heads / p.groups, last = part.last(p.heads);
        for (int64_t head = part.first(p.heads), count; head < last; head += count) {
            const int64_t group = head / shared;
            count = std::min({heads_at_once, last - head, (group + 1) * shared - head});
            const std::size_t before = bytes_of(p.type) * group * row.capacity;
            run.kernel.attend(own, head, count, static_cast<const char*>(layer.keys) + before * p.width,
                              static_cast<const char*>(layer.values) + before * p.value_width, row.length + 1, run.logits(), run.room.logits_stride);
        }
    }
    team.wait();
}

}  // namespace

Elementwise of_row(Elementwise e, const OwnMemory& own, int64_t row) {
    for (Place* p : {&e.y, &e.a, &e.b}) p->at = own.of(p->at, row);
    return e;
}

Attend of_row(Attend p, const OwnMemory& own, int64_t row) {
    for (Head* h : {&p.q, &p.k, &p.v}) h->at = own.of(h->at, row);
    p.y = own.of(p.y, row);
    return p;
}

void append(const Attend& p, const Row& row) {
    if (p.type == Element::float32) append_as<float>(p, row.layers[p.layer], row.length, row.capacity);
    else append_as<uint16_t>(p, row.layers[p.layer], row.length, row.capacity);
}

TapeKernel tape_kernel(Isa isa) {
    switch (isa) {
#ifdef DITHER_X86
        case Isa::avx512: return tape_kernel_avx512();
        case Isa::avx2: return tape_kernel_avx2();
#endif
        default: return tape_kernel_scalar();
    }
}

void Tape::add_length(float* y) {
    steps.push_back({Step::length, lengths.size()});
    lengths.push_back(y);
}

void Tape::add(const Lookup& p) {
    steps.push_back({Step::lookup, lookups.size()});
    lookups.push_back(p);
}

void Tape::add(const Elementwise& e) {
    steps.push_back({Step::elementwise, functions.size()});
    functions.push_back(e);
}

void Tape::add(const Products& p) {
    steps.push_back({Step::products, products.size()});
    products.push_back(p);
    std::stable_sort(products.back().of.begin(), products.back().of.end(), [](const Product& a, const Product& b) {
        const auto key = [](const Product& p) {
            if (p.kind == Product::packed) return std::tuple(p.kind, p.codes.bits, p.codes.group);
            return p.kind == Product::rounded ? std::tuple(p.kind, p.integers.bits, p.integers.group) : std::tuple(p.kind, 0, int64_t{0});
        };
        return key(a) < key(b);
    });
}

void Tape::add(const Attend& a) {
    steps.push_back({Step::attend, attentions.size()});
    attentions.push_back(a);
}

void Tape::check(const Row& row) const {
    for (const Lookup& p : lookups) {
        const int64_t rows = p.packed ? p.codes.rows : p.dense.rows, at = row_of(p, row);
        if (at < 0 || at >= rows) throw std::out_of_range("row " + std::to_string(at) + " of a table of " + std::to_string(rows));
    }
}

int64_t Tape::most_groups() const {
    int64_t most = 0;
    for (const Lookup& p : lookups)
        if (p.packed) most = std::max(most, p.codes.groups);
    return most;
}

void Tape::narrow(const Step& step, const Row& row, int64_t place, const OwnMemory& memory, const TapeKernel& kernel, float* scales, Isa isa) const {
    if (step.kind == Step::length) *static_cast<float*>(memory.of(lengths[step.index], place)) = static_cast<float>(row.length);
    else if (step.kind == Step::elementwise) kernel.elementwise(of_row(functions[step.index], memory, place));
    else if (const Lookup& p = lookups[step.index]; true) look_up(p, row_of(p, row), memory.of(p.y, place), scales, isa);
}

void Tape::run(const Row* rows, int64_t count, bool* finite, Isa isa, int threads) {
    for (int64_t t = 0; t < count; ++t) check(rows[t]);
    run(rows, count, own, 0, steps.size(), finite, isa, threads);
}

void Tape::run(const Row* rows, int64_t count, const OwnMemory& memory, std::size_t from, std::size_t to, bool* finite, Isa isa,
               [[maybe_unused]] int threads) {
    threads = std::max(threads, 1);
#ifndef _OPENMP
    threads = 1;
#endif
    ProductSizes most{};
    most.groups = most_groups();
    for (std::size_t s = from; s < to; ++s) {
        if (steps[s].kind != Step::products) continue;
        const ProductSizes found = sizes_of(products[steps[s].index], isa);
        most.columns = std::max(most.columns, found.columns), most.groups = std::max(most.groups, found.groups);
        most.ready = std::max(most.ready, found.ready), most.outputs = std::max(most.outputs, found.outputs);
        most.scratch = std::max(most.scratch, found.scratch);
    }
    int64_t longest = 0;
    for (int64_t t = 0; t < count; ++t) longest = std::max(longest, rows[t].length);
    Room room;
    room.claims = std::make_unique<Claims[]>(threads);
    room.x = allocate(sizeof(float) * most.columns * count + cache_line);
    room.sums = allocate(sizeof(float) * most.groups * count + cache_line);
    room.ready = allocate(count * (room.ready_each = round_up(most.ready)));
    room.y = allocate(sizeof(float) * most.outputs * count);
    room.scales = allocate(threads * (room.scales_each = round_up(std::max(2 * sizeof(float) * (most.groups + 32), most.scratch))));
    room.logits_stride = (longest / key_panel + 1) * key_panel;
    room.logits = allocate(threads * (room.logits_each = round_up(sizeof(float) * heads_at_once * room.logits_stride)));
    const TapeKernel kernel = tape_kernel(isa);
    Meeting meeting;
#pragma omp parallel num_threads(threads)
    {
#ifdef _OPENMP
        const Team team{omp_get_thread_num(), omp_get_num_threads(), &meeting};
#else
        const Team team{0, 1, &meeting};
#endif
        const Run run{rows, count, memory, isa, kernel, room, finite, team};
        for (std::size_t s = from; s < to; ++s) {
            const Step& step = steps[s];
            if (step.kind == Step::products) multiply(products[step.index], run);
            else if (step.kind == Step::attend) attend(attentions[step.index], run);
            else
                for (int64_t t = 0; t < count; ++t)
                    if (run.is_mine(t)) narrow(step, rows[t], t, memory, kernel, run.scales(), isa);
        }
    }
}

}  // namespace dither
