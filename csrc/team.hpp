// Threads that work side by side and meet often, some microseconds apart. Who is early spins and may do something useful a little at a time, such as
// fetching what comes next; who waits long sleeps, as the others may need the processor.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>

#ifdef DITHER_X86
#include <immintrin.h>
#endif

namespace dither {

struct Meeting {
    alignas(64) std::atomic<int> arrived{0};
    alignas(64) std::atomic<uint32_t> round{0};
};

struct Team {
    int thread, threads;
    Meeting* meeting;

    // the part of `count` that is this thread's
    int64_t first(int64_t count) const { return count * thread / threads; }
    int64_t last(int64_t count) const { return count * (thread + 1) / threads; }

    // Until all are here. `meanwhile()` is called again and again, and says whether it has more to do.
    template <class F>
    void wait(F meanwhile) const {
        if (threads == 1) return;
        const uint32_t round = meeting->round.load(std::memory_order_relaxed);
        if (meeting->arrived.fetch_add(1, std::memory_order_acq_rel) + 1 == threads) {
            meeting->arrived.store(0, std::memory_order_relaxed);
            meeting->round.store(round + 1, std::memory_order_release);
            meeting->round.notify_all();  // a system call only where one sleeps
            return;
        }
        constexpr int patience = 1 << 12;  // some tens of microseconds
        for (int spins = 0; meeting->round.load(std::memory_order_acquire) == round;) {
            if (meanwhile()) continue;
            if (++spins < patience) pause();
            else meeting->round.wait(round, std::memory_order_acquire);
        }
    }
    void wait() const {
        wait([] { return false; });
    }

private:
    static void pause() {
#ifdef DITHER_X86
        _mm_pause();
#endif
    }
};

// Memory that will be read soon, on its way to the second cache.
class Fetch {
public:
    void add(const void* from, int64_t bytes) {
        if (bytes <= 0 || count_ == spans_.size()) return;
        spans_[count_++] = {static_cast<const char*>(from), static_cast<const char*>(from) + bytes};
    }
    // a few lines more; false where there are none, or enough are under way
    bool operator()() {
        if (at_ == count_ || fetched_ >= most) return false;
        Span& span = spans_[at_];
        for (int i = 0; i < 4 && span.from < span.end; ++i, span.from += 64) __builtin_prefetch(span.from, 0, 2);
        fetched_ += 4 * 64;
        if (span.from >= span.end) ++at_;
        return true;
    }

private:
    static constexpr int64_t most = 1 << 19;  // bytes: half of what a core has
    struct Span {
        const char *from, *end;
    };
    std::array<Span, 16> spans_{};
    std::size_t count_ = 0, at_ = 0;
    int64_t fetched_ = 0;
};

}  // namespace dither
