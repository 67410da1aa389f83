// Frozen matrices decoded to fp32 for one product: what a base in 4 bits costs a step. Two numbers a byte; the same bits at every level.
//
//     nf4   blocks of 64, the first number of a byte high:               w = LEVELS[n] * scale        (QLoRA, arXiv 2305.14314)
//     q4    GGUF's Q4_1: blocks of 32, byte j holds inputs j and 16 + j: w = scale * n + offset       two roundings, as ggml
//
// Scales and offsets of the blocks are given as they are, or as int8 with one fp32 step each 256 blocks and a mean: q * step + mean,
// two roundings; of NF4 no less than zero.
#pragma once
#include <cstdint>

#include "isa.h"

namespace lilliput {

constexpr int NF4_BLOCK = 64, Q4_BLOCK = 32, SECOND = 256;

template <class T>
struct PerBlock {
  const T* plain;      // [blocks], or null: then the rest is read
  const int8_t* q;     // [blocks]
  const float* steps;  // [blocks / 256, rounded up]
  float mean;
};

struct Nf4Matrix { PerBlock<float> scales; const uint8_t* numbers; };
struct Q4Matrix { PerBlock<uint16_t> scales, offsets; const uint8_t* numbers; };  // plain: fp16

struct FrozenKernels {  // blocks from..to-1 into out, the address of block 0
  void (*nf4)(const Nf4Matrix& m, float* out, long from, long to);
  void (*q4)(const Q4Matrix& m, float* out, long from, long to);
};
LILLIPUT_DISPATCH(FrozenKernels, frozen)

}  // namespace lilliput
