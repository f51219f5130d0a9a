#include "tape.hpp"

#include <algorithm>
#include <atomic>
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
#include "scratch.hpp"
#include "team.hpp"

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

// How many pieces of a thread's part are taken.
struct alignas(cache_line) Claims {
    std::atomic<int64_t> pieces{0};
};

// What is run: rows, and where the memory of each lies.
struct Run {
    const Row* rows;
    int64_t count;
    OwnMemory own;

    // Work on a row's own memory is one thread's, the same one until all meet.
    bool is_of(int64_t row, const Team& team) const { return row % team.threads == team.thread; }
    Elementwise of(Elementwise e, int64_t row) const {
        for (Place* p : {&e.y, &e.a, &e.b}) p->at = own.of(p->at, row);
        return e;
    }
    Attend of(Attend p, int64_t row) const {
        for (Head* h : {&p.q, &p.k, &p.v}) h->at = own.of(h->at, row);
        p.y = own.of(p.y, row);
        return p;
    }
};

// Memory of one run, made before its threads start: of each row x as floats, its sums, x as a kernel wants it, products before they are narrowed. And
// whether all that was rounded is finite.
struct Room {
    std::unique_ptr<Claims[]> claims;
    Scratch x, sums, ready, y, scales, logits;
    std::size_t scales_each, logits_each;
    int64_t logits_stride;
    std::atomic<bool> finite{true};
};

bool same_preparation(const PackedMatmul& a, const PackedMatmul& b) {
    return a.bits == b.bits && a.group == b.group && a.values == b.values;
}

bool same_preparation(const Int8Matmul& a, const Int8Matmul& b) {
    const auto grid = [](const Int8Matmul& p) { return std::tuple(p.grid, p.divisor, p.lowest, p.highest, p.input_middle, p.step_type.round_to); };
    return a.bits == b.bits && a.group == b.group && grid(a) == grid(b);
}

bool same_preparation(const Product& a, const Product& b) {
    if (a.kind != b.kind) return false;
    if (a.kind == Product::packed) return same_preparation(a.codes, b.codes);
    return a.kind == Product::plain || same_preparation(a.integers, b.integers);
}

int64_t rows_of(const Product& p) {
    return p.kind == Product::packed ? p.codes.rows : p.kind == Product::rounded ? p.integers.rows : p.dense.rows;
}

// What parts and pieces of its rows are multiples of.
int64_t unit_of(const Product& p) { return p.kind == Product::rounded ? few_outputs : 1; }

// A row's bytes, codes only.
int64_t row_bytes(const Product& p) {
    if (p.kind == Product::plain) return p.dense.columns * static_cast<int64_t>(bytes_of(p.dense.type));
    return p.kind == Product::packed ? packed_stride(p.codes.columns, p.codes.bits) : packed_stride(p.integers.columns, p.integers.bits);
}

// The rows that are `team`'s.
struct Part {
    int64_t first, last;

    Part(const Product& p, const Team& team) {
        const int64_t unit = unit_of(p), units = (rows_of(p) + unit - 1) / unit;
        first = team.first(units) * unit, last = std::min(team.last(units) * unit, rows_of(p));
    }
};

// So many that a piece takes about a microsecond a token, and stays in the first cache from one token to the next.
int64_t piece_rows(const Product& p, int64_t tokens, const Team& team) {
    constexpr int64_t bytes = 1 << 14;
    const int64_t unit = std::max<int64_t>(unit_of(p), 4);
    return team.threads == 1 && tokens == 1 ? std::max<int64_t>(rows_of(p), 1) : std::max(bytes / std::max<int64_t>(row_bytes(p), 1) / unit * unit, unit);
}

// The rows of `of` that are `team`'s, as they will be read.
Fetch weights_ahead(const Product* of, const Product* end, const Team& team) {
    Fetch ahead;
    for (; of != end; ++of) {
        const Part own(*of, team);
        const auto part = [&](const void* at, int64_t bytes) { ahead.add(static_cast<const char*>(at) + own.first * bytes, (own.last - own.first) * bytes); };
        const auto grid = [&](const auto& w) {
            part(w.scale, w.groups * ::bytes_of(w.scale_type));
            if (w.zero) part(w.zero, w.groups);
        };
        if (of->kind == Product::packed) grid(of->codes);
        if (of->kind == Product::rounded) grid(of->integers);
        part(of->kind == Product::packed ? of->codes.packed : of->kind == Product::rounded ? of->integers.packed : of->dense.weight, row_bytes(*of));
    }
    return ahead;
}

// All rows of these products, piece by piece: each thread those of its own part, then what others have not begun. Threads are not equally fast: they wait
// for memory, some of which was fetched ahead, and other programs run too. `work(product, y, first, last)`, y [T, O].
template <class Work>
void share(const Product* of, const Product* end, int64_t tokens, float* y, Claims* claims, const Team& team, Work work) {
    for (int turn = 0; turn < team.threads; ++turn) {
        const Team owner{(team.thread + turn) % team.threads, team.threads, team.meeting};
        for (bool more = true; more;) {
            int64_t piece = claims[owner.thread].pieces.fetch_add(1, std::memory_order_relaxed);
            more = false;
            float* to = y;
            for (const Product* one = of; one != end; to += tokens * rows_of(*one), ++one) {
                const Part part(*one, owner);
                const int64_t step = piece_rows(*one, tokens, team), pieces = (part.last - part.first + step - 1) / step;
                if (piece >= pieces) {
                    piece -= pieces;
                    continue;
                }
                work(*one, to, part.first + piece * step, std::min(part.first + (piece + 1) * step, part.last));
                more = true;
                break;
            }
        }
    }
}

// Products whose x is prepared alike stand behind one another; each such run of them waits for its own preparation.
void multiply(const Products& p, const Run& run, const TapeKernel& kernel, Room& room, Isa isa, const Team& team) {
    float *const x = reinterpret_cast<float*>(room.x.get()), *const y = reinterpret_cast<float*>(room.y.get());  // [T, I]
    float* const scales = reinterpret_cast<float*>(room.scales.get() + team.thread * room.scales_each);
    for (int64_t t = 0; t < run.count; ++t)
        if (run.is_of(t, team)) kernel.widen(run.own.of(p.x, t), p.x_type, p.columns, x + t * p.columns);
    for (std::size_t begin = 0, end; begin < p.of.size(); begin = end) {
        const Product& head = p.of[begin];
        for (end = begin + 1; end < p.of.size() && same_preparation(p.of[end], head);) ++end;
        // thread 0 may prepare: the others are done with what was before, as they waited below
        for (int t = 0; team.thread == 0 && t < team.threads; ++t) room.claims[t].pieces.store(0, std::memory_order_relaxed);
        PackedKernel packed{};
        std::size_t ready_each = 0;  // kernels want tokens one behind another
        float* const sums = reinterpret_cast<float*>(room.sums.get());
        std::vector<FewInt8> integers;  // of each row
        if (head.kind == Product::packed) {
            PackedMatmul like = head.codes;
            packed = packed_kernel(like, isa);
            if (packed.ready_bytes) ready_each = packed.ready_bytes(like);
            for (int64_t t = 0; t < run.count; ++t) {
                if (!run.is_of(t, team)) continue;
                like.x = x + t * p.columns;
                sum_groups(like, sums + t * like.groups);
                if (packed.prepare) packed.prepare(like, room.ready.get() + t * ready_each);
            }
        } else if (head.kind == Product::rounded) {
            for (int64_t t = 0; t < run.count; ++t) {
                Int8Matmul like = head.integers;
                like.x = run.own.of(p.x, t);
                FewInt8& own = integers.emplace_back(like, isa);
                own.place(room.ready.get() + t * own.input_bytes());
                if (run.is_of(t, team) && !own.round()) room.finite.store(false, std::memory_order_relaxed);
            }
        }
        team.wait(weights_ahead(&p.of[begin], &p.of[begin] + (end - begin), team));
        const auto some_rows = [&](const Product& one, float* to, int64_t first, int64_t last) {
            const int64_t rows = rows_of(one);
            if (one.kind == Product::packed) {
                PackedMatmul q = one.codes;
                q.tokens = run.count, q.x = x, q.sums = sums, q.ready = room.ready.get(), q.y = to;
                packed.rows(q, first, last, scales);
            } else if (one.kind == Product::rounded) {
                Int8Matmul q = one.integers;
                for (int64_t t = 0; t < run.count; ++t) {
                    q.y = to + t * rows;
                    integers[t].multiply(q, first, last, reinterpret_cast<char*>(scales));
                }
            } else {
                kernel.dense(one.dense, x, run.count, first, last, to);
            }
            for (int64_t t = 0; t < run.count; ++t)
                kernel.narrow(to + t * rows + first, one.y_type, last - first, static_cast<char*>(run.own.of(one.y, t)) + bytes_of(one.y_type) * first);
        };
        share(&p.of[begin], &p.of[begin] + (end - begin), run.count, y, room.claims.get(), team, some_rows);
        team.wait();
    }
}

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

// Every thread takes some heads of every row, as sequences are not equally long; who has one more differs from row to row.
void attend(const Attend& p, const Run& run, const TapeKernel& kernel, const Room& room, const Team& team) {
    for (int64_t t = 0; t < run.count; ++t)
        if (run.is_of(t, team)) append(run.of(p, t), run.rows[t].layers[p.layer], run.rows[t].length, run.rows[t].capacity);
    team.wait();
    float* const logits = reinterpret_cast<float*>(room.logits.get() + team.thread * room.logits_each);
    for (int64_t t = 0; t < run.count; ++t) {
        const Row& row = run.rows[t];
        const Attended& layer = row.layers[p.layer];
        const Attend own = run.of(p, t);
        const Team part{static_cast<int>((team.thread + t) % team.threads), team.threads, team.meeting};
        const int64_t shared = p.heads / p.groups, last = part.last(p.heads);
        for (int64_t head = part.first(p.heads), count; head < last; head += count) {
            const int64_t group = head / shared;
            count = std::min({heads_at_once, last - head, (group + 1) * shared - head});
            const std::size_t before = bytes_of(p.type) * group * row.capacity;
            kernel.attend(own, head, count, static_cast<const char*>(layer.keys) + before * p.width,
                          static_cast<const char*>(layer.values) + before * p.value_width, row.length + 1, logits, room.logits_stride);
        }
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

bool Tape::run(const Row* rows, int64_t count, Isa isa, [[maybe_unused]] int threads) {
    const Run run{rows, count, own};
    const TapeKernel kernel = choose(isa);
    threads = std::max(threads, 1);
#ifndef _OPENMP
    threads = 1;
#endif
    std::size_t columns = 0, groups = 0, ready = 0, outputs = 0, scratch = 0;
    for (const Lookup& p : lookups) {
        const int64_t most = p.packed ? p.codes.rows : p.dense.rows;
        for (int64_t t = 0; t < count; ++t)
            if (const int64_t row = row_of(p, rows[t]); row < 0 || row >= most)
                throw std::out_of_range("row " + std::to_string(row) + " of a table of " + std::to_string(most));
        if (p.packed) groups = std::max<std::size_t>(groups, p.codes.groups);
    }
    for (const Products& p : products) {
        columns = std::max<std::size_t>(columns, p.columns);
        std::size_t of_all = 0;
        for (const Product& one : p.of) {
            of_all += rows_of(one);
            if (one.kind == Product::rounded) {
                const FewInt8 integers(one.integers, isa);
                ready = std::max(ready, integers.input_bytes());
                scratch = std::max(scratch, integers.scratch_bytes());
            }
            if (one.kind != Product::packed) continue;
            groups = std::max<std::size_t>(groups, one.codes.groups);
            const PackedKernel packed = packed_kernel(one.codes, isa);
            if (packed.ready_bytes) ready = std::max<std::size_t>(ready, packed.ready_bytes(one.codes));
        }
        outputs = std::max(outputs, of_all);
    }
    int64_t longest = 0;
    for (int64_t t = 0; t < count; ++t) longest = std::max(longest, rows[t].length);
    Room room;
    room.claims = std::make_unique<Claims[]>(threads);
    room.x = allocate(sizeof(float) * columns * count + cache_line);
    room.sums = allocate(sizeof(float) * groups * count + cache_line);
    room.ready = allocate(ready * count);
    room.y = allocate(sizeof(float) * outputs * count);
    room.scales_each = round_up(std::max(2 * sizeof(float) * (groups + 32), scratch));
    room.scales = allocate(room.scales_each * threads);
    room.logits_stride = (longest / key_panel + 1) * key_panel;
    room.logits_each = round_up(sizeof(float) * heads_at_once * room.logits_stride);
    room.logits = allocate(room.logits_each * threads);
    Meeting meeting;
#pragma omp parallel num_threads(threads)
    {
#ifdef _OPENMP
        const Team team{omp_get_thread_num(), omp_get_num_threads(), &meeting};
#else
        const Team team{0, 1, &meeting};
#endif
        for (const Step& step : steps) {
            switch (step.kind) {
                case Step::lookup: {
                    const Lookup& p = lookups[step.index];
                    for (int64_t t = 0; t < count; ++t)
                        if (run.is_of(t, team))
                            look_up(p, row_of(p, rows[t]), own.of(p.y, t), reinterpret_cast<float*>(room.scales.get() + team.thread * room.scales_each), isa);
                    break;
                }
                case Step::elementwise:
                    for (int64_t t = 0; t < count; ++t)
                        if (run.is_of(t, team)) kernel.elementwise(run.of(functions[step.index], t));
                    break;
                case Step::products: multiply(products[step.index], run, kernel, room, isa, team); break;
                case Step::attend: attend(attentions[step.index], run, kernel, room, team); break;
            }
        }
    }
    return room.finite;
}

}  // namespace dither
