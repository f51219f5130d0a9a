#include "tape_run.hpp"

#include <algorithm>
#include <array>
#include <optional>
#include <tuple>

#include "packing.hpp"

namespace dither {

namespace {

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

// x as products of one kind want it.
struct Prepared {
    PackedKernel packed{};
    std::array<std::optional<FewInt8>, few_tokens> integers;  // of each row
    const float *x = nullptr, *sums = nullptr;                // [T, I], [T, G]
    const char* ready = nullptr;                              // one row's behind another's
};

// Of this thread's rows; others prepare theirs. `x`: as floats; `own`: as it lies in the memory of row 0.
Prepared prepare(const Product& head, const void* own, const float* x, const Run& run) {
    Prepared to;
    Room& room = run.room;
    float* const sums = reinterpret_cast<float*>(room.sums.get());
    to.x = x, to.sums = sums, to.ready = room.ready.get();
    if (head.kind == Product::packed) {
        PackedMatmul like = head.codes;
        to.packed = packed_kernel(like, run.isa);
        const std::size_t each = to.packed.ready_bytes ? to.packed.ready_bytes(like) : 0;  // kernels want tokens one behind another
        for (int64_t t = 0; t < run.count; ++t) {
            if (!run.is_mine(t)) continue;
            like.x = x + t * like.columns;
            sum_groups(like, sums + t * like.groups);
            if (to.packed.prepare) to.packed.prepare(like, room.ready.get() + t * each);
        }
    } else if (head.kind == Product::rounded) {
        for (int64_t t = 0; t < run.count; ++t) {
            Int8Matmul like = head.integers;
            like.x = run.own.of(own, t);
            FewInt8& row = to.integers[t].emplace(like, run.isa);
            row.place(room.ready.get() + t * room.ready_each);
            if (run.is_mine(t) && !row.round()) run.finite[t] = false;
        }
    }
    return to;
}

}  // namespace

const Product* end_of_alike(const Product* of, const Product* end) {
    const Product& head = *of;
    while (++of != end && same_preparation(*of, head)) {}
    return of;
}

ProductSizes sizes_of(const Products& p, Isa isa) {
    ProductSizes found{static_cast<std::size_t>(p.columns), 0, 0, 0, 0};
    for (const Product& one : p.of) {
        found.outputs += rows_of(one);
        if (one.kind == Product::rounded) {
            const FewInt8 integers(one.integers, isa);
            found.ready = std::max(found.ready, integers.input_bytes());
            found.scratch = std::max(found.scratch, integers.scratch_bytes());
        }
        if (one.kind != Product::packed) continue;
        found.groups = std::max<std::size_t>(found.groups, one.codes.groups);
        const PackedKernel packed = packed_kernel(one.codes, isa);
        if (packed.ready_bytes) found.ready = std::max<std::size_t>(found.ready, packed.ready_bytes(one.codes));
    }
    return found;
}

// Products whose x is prepared alike stand behind one another; each such run of them waits for its own preparation. Who waits fetches weights: so memory is
// at work while one thread does what is narrow.
void multiply(const Products& p, const Run& run) {
    Room& room = run.room;
    const Team& team = run.team;
    float *const x = reinterpret_cast<float*>(room.x.get()), *const y = reinterpret_cast<float*>(room.y.get());  // [T, I]
    for (int64_t t = 0; t < run.count; ++t)
        if (run.is_mine(t)) run.kernel.widen(run.own.of(p.x, t), p.x_type, p.columns, x + t * p.columns);
    const Product* const end = p.of.data() + p.of.size();
    for (const Product *of = p.of.data(), *alike; of != end; of = alike) {
        alike = end_of_alike(of, end);
        // thread 0 may set back: the others are done with what was before, as they waited below
        for (int t = 0; team.thread == 0 && t < team.threads; ++t) room.claims[t].pieces.store(0, std::memory_order_relaxed);
        const Prepared in = prepare(*of, p.x, x, run);
        team.wait(weights_ahead(of, alike, team));
        share(of, alike, run.count, y, room.claims.get(), team, [&](const Product& one, float* to, int64_t first, int64_t last) {
            const int64_t rows = rows_of(one);
            if (one.kind == Product::packed) {
                PackedMatmul q = one.codes;
                q.tokens = run.count, q.x = in.x, q.sums = in.sums, q.ready = in.ready, q.y = to;
                in.packed.rows(q, first, last, run.scales());
            } else if (one.kind == Product::rounded) {
                Int8Matmul q = one.integers;
                for (int64_t t = 0; t < run.count; ++t) {
                    q.y = to + t * rows;
                    in.integers[t]->multiply(q, first, last, reinterpret_cast<char*>(run.scales()));
                }
            } else {
                run.kernel.dense(one.dense, x, run.count, first, last, to);
            }
            for (int64_t t = 0; t < run.count; ++t) {
                void* const at = static_cast<char*>(run.own.of(one.y, t)) + bytes_of(one.y_type) * first;
                run.kernel.narrow(to + t * rows + first, one.y_type, last - first, at);
            }
        });
        team.wait();
    }
}

}  // namespace dither
