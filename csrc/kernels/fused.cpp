#include "fused.h"

#include "rows.h"

namespace lilliput {
namespace LILLIPUT_ISA { namespace {

void bias_gelu(bool tanh, const float* bias, float* x, int width) {
  for (int i = 0; i < width; i += W) {
    const int n = width - i < W ? width - i : W;
    vf v = n == W ? load(x + i) : load_n(x + i, n);
    if (bias) v = v + (n == W ? load(bias + i) : load_n(bias + i, n));
    v = tanh ? gelu_tanh(v) : gelu(v);
    if (n == W) store(x + i, v); else store_n(x + i, v, n);
  }
}

void residual_norm(const NormAfter& n, const float* x, const float* residual, float* y, int width) {
  int i = 0;
  for (; i + W <= width; i += W) {
    const vf v = n.bias ? load(x + i) + load(n.bias + i) : load(x + i);
    store(y + i, v + load(residual + i));
  }
  for (; i < width; i++) y[i] = (n.bias ? x[i] + n.bias[i] : x[i]) + residual[i];
  layer_norm_row(n.weight, n.beta, n.eps, y, y, width);
}

}}  // namespace LILLIPUT_ISA

extern const FusedKernels LILLIPUT_TABLE(fused) = {LILLIPUT_ISA::bias_gelu, LILLIPUT_ISA::residual_norm};

}  // namespace lilliput
