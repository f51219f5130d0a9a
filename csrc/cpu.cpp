#include "cpu.hpp"

#include <stdexcept>
#include <string>

#if defined(DITHER_X86) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace dither {

Isa best_isa() {
#ifdef DITHER_X86
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma"))
        return Isa::avx512;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Isa::avx2;
#endif
    return Isa::scalar;
}

Isa parse_isa(const char* name) {
    const Isa best = best_isa();
    const std::string wanted = name;
    if (wanted.empty()) return best;
    for (Isa isa : {Isa::scalar, Isa::avx2, Isa::avx512}) {
        if (wanted != name_of(isa)) continue;
        if (isa > best) throw std::invalid_argument("DITHER_ISA=" + wanted + ": this processor has only " + name_of(best));
        return isa;
    }
    throw std::invalid_argument("DITHER_ISA=" + wanted + ": must be scalar, avx2 or avx512");
}

const char* name_of(Isa isa) {
    switch (isa) {
        case Isa::avx512: return "avx512";
        case Isa::avx2: return "avx2";
        default: return "scalar";
    }
}

bool has_avx512_bf16() {
#ifdef DITHER_X86
    return best_isa() == Isa::avx512 && __builtin_cpu_supports("avx512bf16");
#else
    return false;
#endif
}

bool has_avx512_vbmi2() {
#ifdef DITHER_X86
    return has_avx512_vbmi() && __builtin_cpu_supports("avx512vbmi2") && __builtin_cpu_supports("popcnt");
#else
    return false;
#endif
}

bool has_avx512_vnni() {
#ifdef DITHER_X86
    return best_isa() == Isa::avx512 && __builtin_cpu_supports("avx512vnni");
#else
    return false;
#endif
}

bool has_avx512_vbmi() {
#ifdef DITHER_X86
    return best_isa() == Isa::avx512 && __builtin_cpu_supports("avx512vbmi");
#else
    return false;
#endif
}

#if defined(DITHER_X86) && defined(__linux__)
namespace {

// Tiles are state that the kernel saves with a thread only once it is allowed to: arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA), from Linux 5.16 on.
bool lent_tiles() { return syscall(SYS_arch_prctl, 0x1023, 18) == 0; }

}  // namespace
#endif

bool has_amx_int8() {
#if defined(DITHER_X86) && defined(__linux__)
    static const bool lent = best_isa() == Isa::avx512 && __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-int8") && lent_tiles();
    return lent;
#else
    return false;
#endif
}

bool has_amx_bf16() {
#if defined(DITHER_X86) && defined(__linux__)
    static const bool lent = has_avx512_bf16() && __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16") && lent_tiles();
    return lent;
#else
    return false;
#endif
}

}  // namespace dither
