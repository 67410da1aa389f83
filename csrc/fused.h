// Passes over packed rows that save a trip through memory each (ByteTransformer, Zhai et al. 2023, arXiv 2210.03052, section III):
//     bias_act        x = act(x + bias), in place                  after a product
//     residual_norm   y = LayerNorm(x + bias + residual)           after the products that end a block of a post-norm encoder
// A row's result depends on that row alone.
#pragma once
#include "isa.h"

namespace lilliput {

struct NormAfter {
  const float* bias;    // of the product; may be null
  const float* weight;  // of the norm, as is beta
  const float* beta;
  float eps;
};

struct FusedKernels {
  void (*bias_gelu)(bool tanh, const float* bias, float* x, int width);                             // one row; bias may be null
  void (*residual_norm)(const NormAfter& n, const float* x, const float* residual, float* y, int width);  // one row; y may be x or residual
};
LILLIPUT_DISPATCH(FusedKernels, fused)

}  // namespace lilliput
