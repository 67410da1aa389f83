// AdamW in one pass over weights, gradients and both moments, in tiles of 4096 numbers. Each number's update depends on itself alone,
// so the result is the same bits for any tiling and number of threads.
// bf16 weights are widened, updated in fp32 and rounded stochastically in the same pass; the random bits are a hash of (key, index).
// Master weights: fp32 weights whose gradients are scaled on the way in and whose bf16 copy is written on the way out.
#pragma once
#include <cstdint>

#include "isa.h"

namespace lilliput {

struct AdamwStep {  // Loshchilov and Hutter 2019, algorithm 2, with torch's order of operations
  float lr, beta1, beta2, eps, decay;  // decay: 1 - lr * weight_decay
  float correction1, root2;            // 1 - beta1^t, sqrt(1 - beta2^t)
  uint64_t key;                        // of the rounding
};

struct AdamwKernels {
  void (*fp32)(const AdamwStep& s, float* weight, const float* gradient, float* first, float* second, long count);
  // gradient bf16 too; `from`: index of the first number in its tensor
  void (*bf16)(const AdamwStep& s, uint16_t* weight, const uint16_t* gradient, float* first, float* second, long from, long count);
  // gradient: bf16, or fp32 where `wide`; each is multiplied by `scale`. copy: the new weights in bf16, rounded to nearest even; ahead: with what this
  // update changed added once more
  void (*master)(const AdamwStep& s, float scale, float* weight, const void* gradient, bool wide, float* first, float* second, uint16_t* copy, bool ahead,
                 long count);
};
LILLIPUT_DISPATCH(AdamwKernels, adamw)

}  // namespace lilliput
