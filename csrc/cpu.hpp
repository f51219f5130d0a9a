// Which instruction set the kernels use. Every operation has a scalar, an AVX2 and an AVX-512 version.
#pragma once

namespace dither {

enum class Isa { scalar, avx2, avx512 };

// The best that both this build and this processor have.
Isa best_isa();

// "" is the best; else "scalar", "avx2" or "avx512". Throws std::invalid_argument for other names and for what the processor lacks.
Isa parse_isa(const char* name);

const char* name_of(Isa isa);

// vdpbf16ps: two bfloat16 products summed into each float32 lane.
bool has_avx512_bf16();

// vpdpbusd: four products of bytes summed into each int32 lane.
bool has_avx512_vnni();

// vpermb: any bytes of a vector in any order.
bool has_avx512_vbmi();

// vpexpandb: the bytes of a vector to places that a mask names; and vpermb.
bool has_avx512_vbmi2();

// Tiles of bfloat16, which Linux lends to a process that asks for them.
bool has_amx_bf16();
bool has_amx_int8();

}  // namespace dither
