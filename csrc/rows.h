// LayerNorm and activations of one row: the step's regions and the fused passes over packed rows use the same ones.
// Inside kernels/ only. Sums run in one chain of W lanes and one final reduction: the same for every number of rows.
#pragma once
#include "vec.h"

namespace lilliput { namespace LILLIPUT_ISA {

LP_INLINE void layer_norm_row(const float* weight, const float* bias, float eps, const float* x, float* y, int dim) {
  vf total = zero();
  int i = 0;
  for (; i + W <= dim; i += W) total = total + load(x + i);
  if (i < dim) total = total + load_n(x + i, dim - i);
  const float mean = sum(total) / float(dim);
  total = zero();
  for (i = 0; i + W <= dim; i += W) { const vf v = load(x + i) - set1(mean); total = fma(v, v, total); }
  float rest = 0;
  for (; i < dim; i++) rest += (x[i] - mean) * (x[i] - mean);
  const float scale = 1.0f / __builtin_sqrtf((sum(total) + rest) / float(dim) + eps);
  for (i = 0; i + W <= dim; i += W) store(y + i, fma((load(x + i) - set1(mean)) * set1(scale), load(weight + i), load(bias + i)));
  for (; i < dim; i++) y[i] = (x[i] - mean) * scale * weight[i] + bias[i];
}

}}  // namespace lilliput::LILLIPUT_ISA
