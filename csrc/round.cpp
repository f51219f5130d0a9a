#include "round.hpp"

namespace dither {

namespace {

RoundRow choose(Isa isa) {
    switch (isa) {
#ifdef DITHER_X86
        case Isa::avx512: return round_row_avx512();
        case Isa::avx2: return round_row_avx2();
#endif
        default: return round_row_scalar();
    }
}

RoundPiece choose_piece(Isa isa) {
    switch (isa) {
#ifdef DITHER_X86
        case Isa::avx512: return round_piece_avx512();
        case Isa::avx2: return round_piece_avx2();
#endif
        default: return round_piece_scalar();
    }
}

constexpr int64_t piece_size = 4096;  // values: in and out fit the first cache

}  // namespace

bool round_affine(const RoundProblem& problem, Isa isa, [[maybe_unused]] int threads) {
    const RoundRow row = choose(isa);
    bool finite = true;
#pragma omp parallel for schedule(static) num_threads(threads) reduction(&& : finite)
    for (int64_t r = 0; r < problem.rows; ++r) finite = row(problem, r) && finite;
    return finite;
}

bool round_to_one_grid(const GridProblem& problem, Isa isa, [[maybe_unused]] int threads) {
    const RoundPiece piece = choose_piece(isa);
    bool finite = true;
#pragma omp parallel for schedule(static) num_threads(threads) reduction(&& : finite)
    for (int64_t first = 0; first < problem.count; first += piece_size) {
        const int64_t left = problem.count - first;
        finite = piece(problem, first, left < piece_size ? left : piece_size) && finite;
    }
    return finite;
}

}  // namespace dither
