// What a run of a tape (tape.hpp) has beside its instructions: rows, where the memory of each lies, room for what is prepared, and the threads.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>

#include "scratch.hpp"
#include "tape.hpp"
#include "team.hpp"

namespace dither {

inline std::size_t bytes_of(Element type) { return type == Element::float32 ? 4 : 2; }

// How many pieces of a thread's part of some products are taken.
struct alignas(cache_line) Claims {
    std::atomic<int64_t> pieces{0};
};

// Memory of one run, made before its threads start: of each row x as floats, its sums, x as a kernel wants it, products before they are narrowed; scales and
// logits of each thread.
struct Room {
    std::unique_ptr<Claims[]> claims;
    Scratch x, sums, ready, y, scales, logits;
    std::size_t ready_each, scales_each, logits_each;
    int64_t logits_stride;
};

// A thread's view of a run.
struct Run {
    const Row* rows;
    int64_t count;
    OwnMemory own;
    Isa isa;
    TapeKernel kernel;
    Room& room;
    bool* finite;  // of each row: whether all that was rounded is; written by the thread whose row it is
    Team team;

    // Work on a row's own memory is one thread's, the same one until all meet.
    bool is_mine(int64_t row) const { return row % team.threads == team.thread; }
    float* scales() const { return reinterpret_cast<float*>(room.scales.get() + team.thread * room.scales_each); }
    float* logits() const { return reinterpret_cast<float*>(room.logits.get() + team.thread * room.logits_each); }
};

void multiply(const Products&, const Run&);
void append(const Attend&, const Row&);  // a token's keys and values behind those before it
Elementwise of_row(Elementwise, const OwnMemory&, int64_t row);
Attend of_row(Attend, const OwnMemory&, int64_t row);
TapeKernel tape_kernel(Isa);

// What the room must hold for products of a row.
struct ProductSizes {
    std::size_t columns, groups, ready, outputs, scratch;  // numbers; of `ready` and `scratch`: bytes
};
ProductSizes sizes_of(const Products&, Isa);

// Of the products that stand together from `of` on, those whose x is prepared alike.
const Product* end_of_alike(const Product* of, const Product* end);

}  // namespace dither
