#include "step.h"

#include "rows.h"

namespace lilliput {
namespace LILLIPUT_ISA { namespace {

// Sums run in one chain of W lanes and one final reduction: the same for every number of rows.
void rms(const float* weight, float eps, const float* x, float* y, int dim) {
  vf total = zero();
  int i = 0;
  for (; i + W <= dim; i += W) { const vf v = load(x + i); total = fma(v, v, total); }
  if (i < dim) { const vf v = load_n(x + i, dim - i); total = fma(v, v, total); }
  const float scale = 1.0f / __builtin_sqrtf(sum(total) / float(dim) + eps);
  for (i = 0; i + W <= dim; i += W) store(y + i, load(x + i) * set1(scale) * load(weight + i));
  if (i < dim) store_n(y + i, load_n(x + i, dim - i) * set1(scale) * load_n(weight + i, dim - i), dim - i);
}

void norm(const Norm& n, const float* x, float* y, int rows, int dim) {
  for (int r = 0; r < rows; r++, x += dim, y += dim)
    if (n.kind == RMS_NORM) rms(n.weight, n.eps, x, y, dim);
    else layer_norm_row(n.weight, n.bias, n.eps, x, y, dim);
}

void head_norm(const float* weight, float eps, float* x, int heads, int head_dim) {
  for (int h = 0; h < heads; h++, x += head_dim) rms(weight, eps, x, x, head_dim);
}

void rotate(const float* cos, const float* sin, float* x, int heads, int head_dim) {
  const int half = head_dim / 2;
  for (int h = 0; h < heads; h++, x += head_dim) {
    int i = 0;
    for (; i + W <= half; i += W) {
      const vf a = load(x + i), b = load(x + half + i), c = load(cos + i), s = load(sin + i);
      store(x + i, fma(-b, s, a * c));
      store(x + half + i, fma(a, s, b * c));
    }
    for (; i < half; i++) {
      const float a = x[i], b = x[half + i];
      x[i] = a * cos[i] - b * sin[i];
      x[half + i] = b * cos[i] + a * sin[i];
    }
  }
}

void act(Act kind, const float* up, float* y, int width) {
  for (int i = 0; i < width; i += W) {
    const int n = width - i < W ? width - i : W;
    vf v = n == W ? load(up + i) : load_n(up + i, n);
    switch (kind) {
      case SWIGLU: v = silu(v) * (n == W ? load(up + width + i) : load_n(up + width + i, n)); break;
      case GELU: v = gelu(v); break;
      case GELU_TANH: v = gelu_tanh(v); break;
      default: v = relu(v);
    }
    if (n == W) store(y + i, v); else store_n(y + i, v, n);
  }
}

void add(const float* x, float* y, long count) {
  long i = 0;
  for (; i + W <= count; i += W) store(y + i, load(y + i) + load(x + i));
  for (; i < count; i++) y[i] += x[i];
}

// y = round(x 2^b) 2^-b, round to e4m3 (4 significant bits, from 2^-9 up, ties to even), b = floor(log2(448 / max|x|)): the difference of
// two numbers' bits. A row with a number that is not finite becomes NaN. ops/fp8.py is the reference.
void round8(const float* x, float* y, int width) {
  vi most = bits(zero());
  int i = 0;
  for (; i + W <= width; i += W) most = max(most, bits(abs(load(x + i))));
  if (i < width) most = max(most, bits(abs(load_n(x + i, width - i))));
  const int32_t top = hmax(most), largest = 0x43e00000, finite = 0x7f7fffff;
  int32_t b = top == 0 ? 0 : (largest - top) >> 23;
  b = b > 126 ? 126 : b < -126 ? -126 : b;
  const vf scale = set1(bits_float((127 + b) << 23)), back = set1(top > finite ? bits_float(0x7fc00000) : bits_float((127 - b) << 23));
  const vi exponent = bits(set1(bits_float(0x7f800000)));
  for (i = 0; i < width; i += W) {
    const int n = width - i < W ? width - i : W;
    const vf v = (n == W ? load(x + i) : load_n(x + i, n)) * scale;
    const vf step = max(floats(bits(v) & exponent), set1(0.015625f)) * set1(1572864.0f);  // 1.5 2^20 binades: what is added to it is rounded there
    const vf rounded = ((v + step) - step) * back;
    if (n == W) store(y + i, rounded); else store_n(y + i, rounded, n);
  }
}

}}  // namespace LILLIPUT_ISA

extern const KernelsOfStep LILLIPUT_TABLE(step) = {LILLIPUT_ISA::norm, LILLIPUT_ISA::head_norm, LILLIPUT_ISA::rotate, LILLIPUT_ISA::act, LILLIPUT_ISA::add,
    LILLIPUT_ISA::round8};

}  // namespace lilliput
