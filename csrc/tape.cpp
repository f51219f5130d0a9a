#include "tape.hpp"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "dequantize.hpp"
#include "packed_row.hpp"
#include "packing.hpp"
#include "scratch.hpp"

namespace dither {

namespace {

TapeKernel choose(Isa isa) {
    switch (isa) {
#ifdef DITHER_X86
        case Isa::avx512: return tape_kernel_avx512();
        case Isa::avx2: return tape_kernel_avx2();
#endif
        default: return tape_kernel_scalar();
    }
}

std::size_t bytes_of(Element type) { return type == Element::float32 ? 4 : 2; }

struct Team {
    int thread, threads;

    // the part of `count` that is this thread's
    int64_t first(int64_t count) const { return count * thread / threads; }
    int64_t last(int64_t count) const { return count * (thread + 1) / threads; }
    void wait() const {
        if (threads > 1) {
#pragma omp barrier
        }
    }
};

// Memory of one run, made before its threads start: x as floats, its sums, x as a kernel wants it, products before they are narrowed.
struct Room {
    Scratch x, sums, ready, y, scales, logits;
    std::size_t scales_each, logits_each;
    int64_t logits_stride;
};

bool same_preparation(const PackedMatmul& a, const PackedMatmul& b) {
    return a.bits == b.bits && a.group == b.group && a.values == b.values;
}

// Products whose x is prepared alike stand behind one another; each such run of them waits for its own preparation.
void multiply(const Products& p, const TapeKernel& kernel, const Room& room, Isa isa, const Team& team) {
    float *const x = reinterpret_cast<float*>(room.x.get()), *const y = reinterpret_cast<float*>(room.y.get());
    float* const scales = reinterpret_cast<float*>(room.scales.get() + team.thread * room.scales_each);
    if (team.thread == 0) kernel.widen(p.x, p.x_type, p.columns, x);
    for (std::size_t begin = 0, end; begin < p.of.size(); begin = end) {
        const Product& head = p.of[begin];
        for (end = begin + 1; end < p.of.size() && p.of[end].packed == head.packed && (!head.packed || same_preparation(p.of[end].codes, head.codes));)
            ++end;
        PackedKernel packed{};
        PackedRow short_rows = nullptr;
        PackedMatmul like = head.codes;
        if (head.packed) {
            like.x = x;
            like.sums = reinterpret_cast<const float*>(room.sums.get());
            like.ready = room.ready.get();
            packed = packed_kernel(like, isa);
#ifdef DITHER_X86
            if (isa == Isa::avx512 && has_avx512_bf16()) short_rows = packed_row_avx512bf16(like);
#endif
            if (team.thread == 0) {  // the others are done with what was prepared before: they waited below
                sum_groups(like, reinterpret_cast<float*>(room.sums.get()));
                if (packed.prepare) packed.prepare(like, room.ready.get());
            }
        }
        team.wait();
        float* to = y;
        for (std::size_t i = begin; i < end; ++i) {
            const Product& one = p.of[i];
            const int64_t rows = one.packed ? one.codes.rows : one.dense.rows, first = team.first(rows), last = team.last(rows);
            if (one.packed) {
                PackedMatmul q = one.codes;
                q.x = like.x, q.sums = like.sums, q.ready = like.ready, q.y = to;
                if (short_rows) short_rows(q, first, last);
                else packed.rows(q, first, last, scales);
            } else {
                kernel.dense(one.dense, x, first, last, to);
            }
            kernel.narrow(to + first, one.y_type, last - first, static_cast<char*>(one.y) + bytes_of(one.y_type) * first);
            to += rows;
        }
        team.wait();
    }
}

int64_t row_of(const Lookup& p, int64_t token, int64_t length) { return p.by_length ? length : token; }

// `scales`: [2, groups]
void look_up(const Lookup& p, int64_t row, float* scales, Isa isa) {
    if (!p.packed) {
        const std::size_t bytes = bytes_of(p.y_type) * p.dense.columns;
        std::memcpy(p.y, static_cast<const char*>(p.dense.weight) + bytes * row, bytes);
        return;
    }
    const PackedWeights& w = p.codes;
    float* const zeros = scales + w.groups;
    for (int64_t g = 0; g < w.groups; ++g) {
        scales[g] = scale_at(w, row * w.groups + g);
        zeros[g] = zero_at(w, row * w.groups + g);
    }
    const DequantizeProblem one{1,        w.columns, w.group, w.groups, w.bits, w.packed + row * packed_stride(w.columns, w.bits),
                                w.values, scales,    zeros,   p.y,      p.y_type == Element::bfloat16};
    row_dequantizer(one, isa)(one, 0);
}

// this token's keys and values behind those before it
void append(const Attend& p, const Attended& layer, int64_t length, int64_t capacity) {
    const std::size_t bytes = bytes_of(p.type);
    const auto copy = [&](const Head& from, int64_t group, int64_t width, void* to, int64_t first, int64_t step) {
        for (int64_t i = 0; i < width; ++i)
            std::memcpy(static_cast<char*>(to) + bytes * (first + i * step), static_cast<const char*>(from.at) + bytes * (group * from.head + i * from.feature),
                        bytes);
    };
    for (int64_t g = 0; g < p.groups; ++g) {
        copy(p.k, g, p.width, layer.keys, (g * capacity + length / key_panel * key_panel) * p.width + length % key_panel, key_panel);
        copy(p.v, g, p.value_width, layer.values, (g * capacity + length) * p.value_width, 1);
    }
}

void attend(const Attend& p, const Attended& layer, int64_t length, int64_t capacity, const TapeKernel& kernel, const Room& room, const Team& team) {
    if (team.thread == 0) append(p, layer, length, capacity);
    team.wait();
    const int64_t shared = p.heads / p.groups, last = team.last(p.heads);
    float* const logits = reinterpret_cast<float*>(room.logits.get() + team.thread * room.logits_each);
    for (int64_t head = team.first(p.heads), count; head < last; head += count) {
        const int64_t group = head / shared;
        count = std::min({heads_at_once, last - head, (group + 1) * shared - head});
        const std::size_t before = bytes_of(p.type) * group * capacity;
        kernel.attend(p, head, count, static_cast<const char*>(layer.keys) + before * p.width,
                      static_cast<const char*>(layer.values) + before * p.value_width, length + 1, logits, room.logits_stride);
    }
    team.wait();
}

}  // namespace

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
        const auto key = [](const Product& p) { return p.packed ? p.codes.bits * (int64_t{1} << 40) + p.codes.group : 0; };
        return key(a) < key(b);
    });
}

void Tape::add(const Attend& a) {
    steps.push_back({Step::attend, attentions.size()});
    attentions.push_back(a);
}

void Tape::run(const Attended* layers, int64_t length, int64_t capacity, int64_t token, Isa isa, [[maybe_unused]] int threads) {
    const TapeKernel kernel = choose(isa);
    threads = std::max(threads, 1);
#ifndef _OPENMP
    threads = 1;
#endif
    std::size_t columns = 0, groups = 0, ready = 0, outputs = 0;
    for (const Lookup& p : lookups) {
        const int64_t row = row_of(p, token, length), rows = p.packed ? p.codes.rows : p.dense.rows;
        if (row < 0 || row >= rows) throw std::out_of_range("row " + std::to_string(row) + " of a table of " + std::to_string(rows));
        if (p.packed) groups = std::max<std::size_t>(groups, p.codes.groups);
    }
    for (const Products& p : products) {
        columns = std::max<std::size_t>(columns, p.columns);
        std::size_t rows = 0;
        for (const Product& one : p.of) {
            rows += one.packed ? one.codes.rows : one.dense.rows;
            if (!one.packed) continue;
            groups = std::max<std::size_t>(groups, one.codes.groups);
            const PackedKernel packed = packed_kernel(one.codes, isa);
            if (packed.ready_bytes) ready = std::max<std::size_t>(ready, packed.ready_bytes(one.codes));
        }
        outputs = std::max(outputs, rows);
    }
    Room room;
    room.x = allocate(sizeof(float) * columns + cache_line);
    room.sums = allocate(sizeof(float) * groups + cache_line);
    room.ready = allocate(ready);
    room.y = allocate(sizeof(float) * outputs);
    room.scales_each = round_up(2 * sizeof(float) * (groups + 32));
    room.scales = allocate(room.scales_each * threads);
    room.logits_stride = (length / key_panel + 1) * key_panel;
    room.logits_each = round_up(sizeof(float) * heads_at_once * room.logits_stride);
    room.logits = allocate(room.logits_each * threads);
#pragma omp parallel num_threads(threads)
    {
#ifdef _OPENMP
        const Team team{omp_get_thread_num(), omp_get_num_threads()};
#else
        const Team team{0, 1};
#endif
        for (const Step& step : steps) {
            switch (step.kind) {
                case Step::lookup: {
                    const Lookup& p = lookups[step.index];
                    if (team.thread == 0) look_up(p, row_of(p, token, length), reinterpret_cast<float*>(room.scales.get()), isa);
                    break;
                }
                case Step::elementwise:
                    if (team.thread == 0) kernel.elementwise(functions[step.index]);
                    break;
                case Step::products: multiply(products[step.index], kernel, room, isa, team); break;
                case Step::attend: attend(attentions[step.index], layers[attentions[step.index].layer], length, capacity, kernel, room, team); break;
            }
        }
    }
}

}  // namespace dither
