#include "softmax.hpp"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <limits>
#include <vector>

#include "scratch.hpp"

namespace dither {

namespace {

constexpr int64_t least_work = 1 << 15;  // numbers a thread; waking one costs some microseconds
constexpr double ln2 = 0x1.62e42fefa39efp-1;
constexpr double inf = std::numeric_limits<double>::infinity();

// Exponents of sums that the extended numbers are good for: what was raised to -1e6 (softmax_row.hpp) must vanish beside the sum, in float64 too,
// and the integers of pass 1 must be integers
constexpr double least_exponent = -1e6 / ln2 + 2048, greatest_exponent = 1 << 21;

const SoftmaxPasses& choose(Isa isa, Number type) {
    switch (isa) {
#ifdef DITHER_X86
        case Isa::avx512: return softmax_passes_avx512(type);
        case Isa::avx2: return softmax_passes_avx2(type);
#endif
        default: return softmax_passes_scalar(type);
    }
}

int64_t bytes_of(Number type) { return type == Number::float64 ? 8 : type == Number::float32 ? 4 : 2; }
int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

Power sum_of(Power a, Power b) {
    const double top = std::max(a.exponent, b.exponent);
    const auto part = [&](Power x) { return std::ldexp(x.mantissa, static_cast<int>(std::max(-4096.0, x.exponent - top))); };
    return {part(a) + part(b), top};
}

Peak sum_of(Peak a, Peak b) {
    const double top = std::max(a.greatest, b.greatest);
    return {a.sum * std::exp(a.greatest - top) + b.sum * std::exp(b.greatest - top), top};
}

bool in_domain(Power sum) {  // false for NaN
    return sum.mantissa > 0 && sum.mantissa < inf && sum.exponent >= least_exponent && sum.exponent <= greatest_exponent;
}

// What the chunks of a row give, and rows of which a thread may still be reading when another is at the next one: two sets by turns.
struct Chunks {
    std::vector<Power> powers;
    std::vector<double> greatest, sums;
    std::vector<Peak> peaks;

    explicit Chunks(int64_t count) : powers(count), greatest(count), sums(count), peaks(count) {}
};

// One row, by one thread or by a whole team whose threads all call this
template <bool team>
class Row {
  public:
    Row(const SoftmaxPasses& passes, int64_t columns, Chunks& chunks) : passes_(passes), columns_(columns), chunks_(chunks) {}

    Power extended_sum(const void* x) {
        return reduce(chunks_.powers, [=, this](int64_t begin, int64_t count) { return passes_.extended_sum(x, begin, count); },
                      [](Power a, Power b) { return sum_of(a, b); });
    }
    double greatest(const void* x) {
        return reduce(chunks_.greatest, [=, this](int64_t begin, int64_t count) { return passes_.greatest(x, begin, count); },
                      [](double a, double b) { return std::max(a, b); });
    }
    double sum(const void* x, double top) {
        return add([=, this](int64_t begin, int64_t count) { return passes_.sum(x, begin, count, top); });
    }
    double sum_kept(const void* x, double top, void* kept) {
        return add([=, this](int64_t begin, int64_t count) { return passes_.sum_kept(x, begin, count, top, kept); });
    }
    double dot(const void* y, const void* g) {
        return add([=, this](int64_t begin, int64_t count) { return passes_.dot(y, g, begin, count); });
    }
    Peak online_sum(const void* x) {
        return reduce(chunks_.peaks, [=, this](int64_t begin, int64_t count) { return passes_.online_sum(x, begin, count); },
                      [](Peak a, Peak b) { return sum_of(a, b); });
    }

    template <class Write>  // write(begin, count) of each chunk
    void write(const Write& write) {
        each([&](int64_t, int64_t begin, int64_t count) { write(begin, count); });
    }

  private:
    // the same chunk falls to the same thread in every pass
    template <class F>
    void each(const F& f) {
        const int64_t count = ceil_div(columns_, softmax_chunk);
        const auto at = [&](int64_t c) { f(c, c * softmax_chunk, std::min(softmax_chunk, columns_ - c * softmax_chunk)); };
        if constexpr (team) {
#pragma omp for schedule(static)
            for (int64_t c = 0; c < count; ++c) at(c);
        } else {
            for (int64_t c = 0; c < count; ++c) at(c);
        }
    }

    template <class Sum, class Of, class Merge>
    Sum reduce(std::vector<Sum>& sums, const Of& of, const Merge& merge) {
        each([&](int64_t c, int64_t begin, int64_t count) {
            const int64_t piece = passes_.piece;
            Sum sum = of(begin, std::min(piece, count));
            for (int64_t i = piece; i < count; i += piece) sum = merge(sum, of(begin + i, std::min(piece, count - i)));
            sums[c] = sum;
        });
        Sum total = sums[0];
        for (std::size_t c = 1; c < sums.size(); ++c) total = merge(total, sums[c]);
        return total;
    }

    template <class Of>
    double add(const Of& of) {
        return reduce(chunks_.sums, of, [](double a, double b) { return a + b; });
    }

    const SoftmaxPasses& passes_;
    int64_t columns_;
    Chunks& chunks_;
};

// log-sum-exp as (high, low), whose sum it is: x - high is then exact near the maximum, however large x is
struct Logarithm {
    double high, low;
};

template <bool team>
Logarithm logsumexp_by_maximum(Row<team>& row, const SoftmaxProblem& p, const SoftmaxPasses& passes, const void* x) {
    const double top = row.greatest(x);
    if (std::isinf(top) && p.output == SoftmaxOutput::logsumexp) {  // +-inf themselves, as long as there is no NaN
        bool nan = passes.any_nan(x, 0, p.columns);
        return {nan ? std::numeric_limits<double>::quiet_NaN() : top, 0};
    }
    return {top, std::log(row.sum(x, top))};
}

template <bool team>
Logarithm logsumexp_of(Row<team>& row, const SoftmaxProblem& p, const SoftmaxPasses& passes, const void* x) {
    const Power total = row.extended_sum(x);
    if (!in_domain(total)) return logsumexp_by_maximum(row, p, passes, x);
    const double sum = std::log(total.mantissa) + total.exponent * ln2;
    const double high = p.type == Number::float64 ? sum : static_cast<float>(sum);
    return {high, sum - high};
}

// `kept`: N numbers, where y cannot hold e^(x - max) in full
template <bool team>
void softmax_row(Row<team>& row, const SoftmaxProblem& p, const SoftmaxPasses& passes, const void* x, void* y, void* kept) {
    if (p.algorithm == SoftmaxAlgorithm::two_pass) {
        const Power total = row.extended_sum(x);
        if (in_domain(total)) {
            const Power inverse = {1 / total.mantissa, -total.exponent};
            return row.write([&](int64_t begin, int64_t count) { passes.divide_extended(x, begin, count, inverse, y, p.stream); });
        }
    } else if (p.algorithm == SoftmaxAlgorithm::reload) {
        void* const e = kept ? kept : y;
        const double inverse = 1 / row.sum_kept(x, row.greatest(x), e);
        return row.write([&](int64_t begin, int64_t count) { passes.divide_kept(e, begin, count, inverse, y); });
    }
    double top, inverse;
    if (p.algorithm == SoftmaxAlgorithm::online) {
        const Peak total = row.online_sum(x);
        top = total.greatest;
        inverse = 1 / total.sum;
    } else {
        top = row.greatest(x);
        inverse = 1 / row.sum(x, top);
    }
    row.write([&](int64_t begin, int64_t count) { passes.divide(x, begin, count, top, inverse, y, p.stream); });
}

template <bool team>
void any_row(const SoftmaxProblem& p, const SoftmaxPasses& passes, int64_t r, Chunks& chunks, void* kept) {
    Row<team> row(passes, p.columns, chunks);
    const int64_t stride = p.columns * bytes_of(p.type);
    const void* const x = static_cast<const char*>(p.x) + r * stride;
    void* const y = static_cast<char*>(p.y) + (p.output == SoftmaxOutput::logsumexp ? 0 : r * stride);
    if (p.output == SoftmaxOutput::softmax) return softmax_row(row, p, passes, x, y, kept);
    const Logarithm sum = logsumexp_of(row, p, passes, x);
    if (p.output == SoftmaxOutput::log_softmax)
        return row.write([&](int64_t begin, int64_t count) { passes.subtract(x, begin, count, sum.high, sum.low, y, p.stream); });
    const double whole = sum.low == 0 ? sum.high : sum.high + sum.low;
    const auto put = [&] {
        if (p.type == Number::float64)
            static_cast<double*>(y)[r] = whole;
        else
            static_cast<float*>(y)[r] = static_cast<float>(whole);
    };
    if constexpr (team) {
#pragma omp master
        put();
    } else {
        put();
    }
}

// row(r, chunks, scratch) of every row: rows side by side, or, where there are fewer long rows than threads, one after the other by all threads
template <class Alone, class Together>
void each_row(int64_t rows, int64_t columns, int64_t scratch, int threads, const Alone& alone, const Together& together) {
    if (rows == 0) return;
    const int64_t chunks = ceil_div(columns, softmax_chunk), share = rows * columns / least_work;
    threads = static_cast<int>(std::clamp<int64_t>(threads, 1, std::max<int64_t>(share, 1)));
    if (rows < threads && chunks > 1) {
        Chunks sets[2] = {Chunks(chunks), Chunks(chunks)};
        const Scratch memory = scratch ? allocate(scratch) : nullptr;
#pragma omp parallel num_threads(threads)
        for (int64_t r = 0; r < rows; ++r) together(r, sets[r % 2], memory.get());
        return;
    }
    threads = static_cast<int>(std::min<int64_t>(threads, rows));
#pragma omp parallel num_threads(threads)
    {
        Chunks set(chunks);
        const Scratch memory = scratch ? allocate(scratch) : nullptr;
#pragma omp for schedule(static)
        for (int64_t r = 0; r < rows; ++r) alone(r, set, memory.get());
    }
}

}  // namespace

void softmax(const SoftmaxProblem& p, Isa isa, [[maybe_unused]] int threads) {
    const SoftmaxPasses& passes = choose(isa, p.type);
    const bool apart = p.output == SoftmaxOutput::softmax && p.algorithm == SoftmaxAlgorithm::reload && bytes_of(p.type) == 2;
    each_row(p.rows, p.columns, apart ? p.columns * static_cast<int64_t>(sizeof(float)) : 0, threads,
             [&](int64_t r, Chunks& chunks, void* kept) { any_row<false>(p, passes, r, chunks, kept); },
             [&](int64_t r, Chunks& chunks, void* kept) { any_row<true>(p, passes, r, chunks, kept); });
}

namespace {

template <bool team>
void gradient_row(const SoftmaxGradient& p, const SoftmaxPasses& passes, int64_t r, Chunks& chunks) {
    Row<team> row(passes, p.columns, chunks);
    const int64_t begin = r * p.columns * bytes_of(p.type);
    const void *const y = static_cast<const char*>(p.y) + begin, *const g = static_cast<const char*>(p.g) + begin;
    void* const dx = static_cast<char*>(p.dx) + begin;
    const double dot = row.dot(y, g);
    row.write([&](int64_t first, int64_t count) { passes.gradient(y, g, first, count, dot, dx); });
}

}  // namespace

void softmax_gradient(const SoftmaxGradient& p, Isa isa, [[maybe_unused]] int threads) {
    const SoftmaxPasses& passes = choose(isa, p.type);
    each_row(p.rows, p.columns, 0, threads, [&](int64_t r, Chunks& chunks, void*) { gradient_row<false>(p, passes, r, chunks); },
             [&](int64_t r, Chunks& chunks, void*) { gradient_row<true>(p, passes, r, chunks); });
}

}  // namespace dither
