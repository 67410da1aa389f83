// The limits of this machine, measured with the same pool and instructions that the kernels use.
#pragma once
#include <cstdint>

#include "isa.h"

namespace lilliput {

struct RooflineKernels {
  float (*read)(const float* x, long count);  // sums `count` numbers: bound by reading them
  float (*multiply)(long rounds);             // 12 independent chains of fma: rounds * 12 * lanes * 2 flops
  int32_t (*dot)(long rounds);                // 8 chains of int8 products the way linear_int makes them: rounds * 8 * bytes * 2 operations
  int lanes, bytes;
};
LILLIPUT_DISPATCH(RooflineKernels, roofline)

}  // namespace lilliput
