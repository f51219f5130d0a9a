// Aligned, uninitialised memory that frees itself.
#pragma once

#include <cstddef>
#include <memory>
#include <new>

namespace dither {

inline constexpr std::size_t cache_line = 64;

struct AlignedDelete {
    void operator()(char* p) const { ::operator delete[](p, std::align_val_t(cache_line)); }
};
using Scratch = std::unique_ptr<char[], AlignedDelete>;

inline std::size_t round_up(std::size_t bytes) { return (bytes + cache_line - 1) / cache_line * cache_line; }

inline Scratch allocate(std::size_t bytes) {
    return Scratch(static_cast<char*>(::operator new[](round_up(bytes) + cache_line, std::align_val_t(cache_line))));
}

}  // namespace dither
