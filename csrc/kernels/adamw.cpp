#include "adamw.h"

#include "vec.h"

namespace lilliput {
namespace LILLIPUT_ISA { namespace {

// x / c for x >= 0 or NaN, rounded as a division rounds it, by products: the unit that divides has a root and the other division to do already.
// r: 1 / c to the last bit. The remainder is exact, and sending it through r once more rounds right (Markstein's way of dividing; compared over all
// mantissas for 336 constants: no bit differs). Roots of fp32 numbers are never so small that a remainder underflows. Where x is infinite the
// remainder is NaN, for which max answers its second number: infinity stays.
LP_INLINE vf divided(vf x, float c, [[maybe_unused]] float r) {
#if defined(__AVX2__) || defined(__AVX512F__)
  const vf q = x * set1(r);
  return fma(max(fma(set1(-c), q, x), set1(-1e30f)), set1(r), q);
#else
  return x / set1(c);  // no fused products here, so no exact remainder
#endif
}

LP_INLINE vf update(const AdamwStep& s, vf weight, vf gradient, vf& first, vf& second) {
  first = fma(set1(1 - s.beta1), gradient - first, first);
  second = fma(set1(1 - s.beta2) * gradient, gradient, second * set1(s.beta2));
  const vf bottom = divided(sqrt(second), s.root2, 1.0f / s.root2) + set1(s.eps);
  return weight * set1(s.decay) - set1(s.lr / s.correction1) * (first / bottom);
}

LP_INLINE void step(const AdamwStep& s, float* weight, const float* gradient, float* first, float* second, int n) {
  vf m = n == W ? load(first) : load_n(first, n), v = n == W ? load(second) : load_n(second, n);
  const vf g = n == W ? load(gradient) : load_n(gradient, n), w = update(s, n == W ? load(weight) : load_n(weight, n), g, m, v);
  if (n == W) { store(weight, w); store(first, m); store(second, v); }
  else { store_n(weight, w, n); store_n(first, m, n); store_n(second, v, n); }
}

// Each takes a copy of its numbers: a store to a float might otherwise change them, and they would be divided anew for every vector.
void fp32(const AdamwStep& given, float* weight, const float* gradient, float* first, float* second, long count) {
  const AdamwStep s = given;
  for (long i = 0; i < count; i += W) step(s, weight + i, gradient + i, first + i, second + i, count - i < W ? int(count - i) : W);
}

// 16 random bits of (key, index): a round of splitmix64.
LP_INLINE uint32_t noise(uint64_t key, uint64_t index) {
  uint64_t z = key + (index + 1) * 0x9e3779b97f4a7c15ull;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
  return uint32_t((z ^ (z >> 31)) & 0xffff);
}

LP_INLINE uint16_t rounded(float x, uint32_t random) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  if ((bits & 0x7f800000) == 0x7f800000) return uint16_t(bits >> 16 | ((bits & 0xffff) ? 0x40 : 0));  // infinity stays, NaN stays NaN
  return uint16_t((bits + random) >> 16);
}

void bf16(const AdamwStep& given, uint16_t* weight, const uint16_t* gradient, float* first, float* second, long from, long count) {
  const AdamwStep s = given;
  float w[W], g[W];
  for (long i = 0; i < count; i += W) {
    const int n = count - i < W ? int(count - i) : W;
    for (int j = 0; j < n; j++) { w[j] = bits_float(int32_t(uint32_t(weight[i + j]) << 16)); g[j] = bits_float(int32_t(uint32_t(gradient[i + j]) << 16)); }
    step(s, w, g, first + i, second + i, n);
    for (int j = 0; j < n; j++) weight[i + j] = rounded(w[j], noise(s.key, uint64_t(from + i + j)));
  }
}

// Nearest, ties to even, as torch rounds; a NaN stays one.
LP_INLINE uint16_t nearest(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16, nan = bits >> 16 | 0x40;
  return uint16_t((bits & 0x7fffffff) > 0x7f800000 ? nan : rounded);
}

constexpr int BLOCK = 256;  // numbers that stay in the first cache between the three loops, each of which the compiler vectorises

void master(const AdamwStep& given, float scale, float* weight, const void* gradient, bool wide, float* first, float* second, uint16_t* copy, bool ahead,
            long count) {
  const AdamwStep s = given;
  float g[BLOCK], before[BLOCK];
  for (long at = 0; at < count; at += BLOCK) {
    const int n = count - at < BLOCK ? int(count - at) : BLOCK;
    const uint16_t* narrow = static_cast<const uint16_t*>(gradient) + at;
    if (wide) for (int i = 0; i < n; i++) g[i] = static_cast<const float*>(gradient)[at + i] * scale;
    else for (int i = 0; i < n; i++) g[i] = bits_float(int32_t(uint32_t(narrow[i]) << 16)) * scale;
    if (ahead) memcpy(before, weight + at, n * sizeof(float));
    for (int i = 0; i < n; i += W) step(s, weight + at + i, g + i, first + at + i, second + at + i, n - i < W ? n - i : W);
    if (ahead) for (int i = 0; i < n; i++) copy[at + i] = nearest(weight[at + i] + (weight[at + i] - before[i]));
    else for (int i = 0; i < n; i++) copy[at + i] = nearest(weight[at + i]);
  }
}

}}  // namespace LILLIPUT_ISA

extern const AdamwKernels LILLIPUT_TABLE(adamw) = {LILLIPUT_ISA::fp32, LILLIPUT_ISA::bf16, LILLIPUT_ISA::master};

}  // namespace lilliput
