// The parts of int8_matmul.hpp for one instruction set. `K` has
//     Int, Float             vectors of as many lanes
//     Code, Input            codes and q of four lanes columns, ready to be multiplied: code(Int), input(Int) and, back to bytes, bytes(Code)
//     dot(sum, code, input)  adds four products to each lane
//     Decoder                codes(from, aim(bit)): those of 4 lanes columns that begin at a bit of `from`; reads `reach` bytes
//     tokens, vectors        what `many` takes at once, so that sums, codes and q stay in registers
#pragma once

#include "int8_few.hpp"
#include "int8_many.hpp"
#include "int8_round.hpp"

namespace {

template <class K, class Tiles = NoTiles>
dither::Int8Kernel int8_kernel(dither::Int8Row (*row)(const dither::Int8Matmul&) = nullptr) {
    constexpr int L = K::Int::lanes;
    return {L, K::vectors * L, Tiles::depth, row, round_token<typename K::Float>, few_bytes<typename K::Int>, few<K>, many_bytes<K>, many<K, Tiles>};
}

}  // namespace
