#include "bessel.hpp"

#include <algorithm>
#include <cmath>
#include <limits>

#include "scratch.hpp"

namespace dither {

namespace {

constexpr int regions = static_cast<int>(BesselRegion::count);
constexpr int64_t longest = bessel_chunk + regions * bessel_lanes;  // a sorted chunk with its padding
constexpr double infinity = std::numeric_limits<double>::infinity(), nan = std::numeric_limits<double>::quiet_NaN();

// 0, infinity, NaN and what is not in the domain
void limit(bool second, double v, double x, double& value, double* ratio) {
    double quotient = nan;
    value = nan;
    if (!(v >= 0 && x >= 0) || (std::isinf(v) && std::isinf(x))) {
        // NaN
    } else if (std::isinf(v)) {
        value = second ? infinity : -infinity;
        quotient = 0;
    } else if (std::isinf(x)) {
        value = second ? -infinity : infinity;
        quotient = 1;
    } else if (x == 0) {
        value = second ? infinity : v == 0 ? 0 : -infinity;
        quotient = !second || v > 0.5 ? 0 : v == 0.5 ? 1 : infinity;
    }
    if (ratio) *ratio = quotient;
}

struct Chunk {
    double v[longest], x[longest], value[longest], ratio[longest];
    uint8_t region[bessel_chunk + bessel_lanes];
    int32_t place[bessel_chunk];
};

void run_chunk(const BesselProblem& p, const BesselKernel& kernel, int64_t from, int64_t n, Chunk& c) {
    const double *v = p.v + from, *x = p.x + from;
    if (p.regions) {
        std::copy_n(p.regions + from, n, c.region);
    } else {
        const int64_t whole = n / bessel_lanes * bessel_lanes;
        kernel.classify(v, x, c.region, whole);
        if (whole < n) {  // the last pairs in a vector of their own
            double last_v[bessel_lanes] = {}, last_x[bessel_lanes] = {};
            std::copy(v + whole, v + n, last_v);
            std::copy(x + whole, x + n, last_x);
            kernel.classify(last_v, last_x, c.region + whole, bessel_lanes);
        }
    }
    const bool alone = std::all_of(c.region + 1, c.region + n, [&](uint8_t r) { return r == c.region[0]; });
    if (alone && n % bessel_lanes == 0 && c.region[0] != static_cast<uint8_t>(BesselRegion::limit)) {  // nothing to sort
        kernel.run(static_cast<BesselRegion>(c.region[0]), p.second, p.tables, v, x, p.value + from, p.ratio ? p.ratio + from : nullptr, n);
        return;
    }
    int64_t count[regions] = {}, start[regions], next[regions];
    for (int64_t i = 0; i < n; ++i) ++count[c.region[i]];
    int64_t at = 0;
    for (int r = 0; r < regions; ++r) {
        start[r] = next[r] = at;
        at += (count[r] + bessel_lanes - 1) / bessel_lanes * bessel_lanes;
        for (int64_t i = start[r] + count[r]; i < at; ++i) c.v[i] = 1, c.x[i] = 40;  // harmless everywhere
    }
    for (int64_t i = 0; i < n; ++i) {
        const int64_t place = next[c.region[i]]++;
        c.place[i] = static_cast<int32_t>(place);
        c.v[place] = v[i];
        c.x[place] = x[i];
    }
    double* const ratio = p.ratio ? c.ratio : nullptr;
    for (int r = 0; r < regions; ++r) {
        const int64_t s = start[r];
        if (r == static_cast<int>(BesselRegion::limit)) {
            for (int64_t i = s; i < s + count[r]; ++i) limit(p.second, c.v[i], c.x[i], c.value[i], ratio ? ratio + i : nullptr);
        } else if (count[r]) {
            const int64_t padded = (count[r] + bessel_lanes - 1) / bessel_lanes * bessel_lanes;
            kernel.run(static_cast<BesselRegion>(r), p.second, p.tables, c.v + s, c.x + s, c.value + s, ratio ? ratio + s : nullptr, padded);
        }
    }
    for (int64_t i = 0; i < n; ++i) p.value[from + i] = c.value[c.place[i]];
    if (p.ratio)
        for (int64_t i = 0; i < n; ++i) p.ratio[from + i] = c.ratio[c.place[i]];
}

}  // namespace

BesselKernel bessel_kernel(Isa isa) {
    switch (isa) {
#ifdef DITHER_X86
        case Isa::avx512: return bessel_kernel_avx512();
        case Isa::avx2: return bessel_kernel_avx2();
#endif
        default: return bessel_kernel_scalar();
    }
}

void log_bessel(const BesselProblem& p, Isa isa, [[maybe_unused]] int threads) {
    const BesselKernel kernel = bessel_kernel(isa);
    const int64_t chunks = (p.n + bessel_chunk - 1) / bessel_chunk;
    threads = static_cast<int>(std::clamp<int64_t>(threads, 1, std::max<int64_t>(chunks, 1)));
#pragma omp parallel num_threads(threads)
    {
        const Scratch memory = allocate(sizeof(Chunk));
        Chunk& chunk = *reinterpret_cast<Chunk*>(memory.get());
#pragma omp for schedule(static)
        for (int64_t c = 0; c < chunks; ++c) run_chunk(p, kernel, c * bessel_chunk, std::min(bessel_chunk, p.n - c * bessel_chunk), chunk);
    }
}

}  // namespace dither
