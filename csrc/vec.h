// Vectors of fp32 (vf, W lanes) and int32 (vi) for the level being compiled: 16 lanes in AVX-512, 8 in AVX2, 4 elsewhere (compiler
// vectors: SSE2 on x86, NEON on Arm). Include inside kernels/ only, after the system headers. All loads and stores are unaligned.
//
// fma is a true fused multiply-add except at the scalar level of x86 (no FMA there: two roundings).
// exp, tanh and erf are polynomials with relative errors below 2e-7, 3e-7 and 2e-7.
#pragma once
#include <stdint.h>
#include <string.h>
#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

#include "isa.h"

namespace lilliput { namespace LILLIPUT_ISA {

#if defined(__AVX512F__)
constexpr int W = 16;
using vf = __m512; using vi = __m512i;
#elif defined(__AVX2__)
constexpr int W = 8;
using vf = __m256; using vi = __m256i;
#else
constexpr int W = 4;
typedef float vf __attribute__((vector_size(16)));
typedef int32_t vi __attribute__((vector_size(16)));
#endif

#define LP_INLINE static inline __attribute__((always_inline))

LP_INLINE vf load(const float* p) { vf v; memcpy(&v, p, sizeof v); return v; }
LP_INLINE void store(float* p, vf v) { memcpy(p, &v, sizeof v); }
LP_INLINE float bits_float(int32_t i) { float f; memcpy(&f, &i, 4); return f; }

#if defined(__AVX512F__)
LP_INLINE vf set1(float x) { return _mm512_set1_ps(x); }
LP_INLINE vf zero() { return _mm512_setzero_ps(); }
LP_INLINE vf fma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
LP_INLINE vf max(vf a, vf b) { return _mm512_max_ps(a, b); }
LP_INLINE vf min(vf a, vf b) { return _mm512_min_ps(a, b); }
LP_INLINE vf abs(vf a) { return _mm512_abs_ps(a); }
LP_INLINE vf sqrt(vf a) { return _mm512_sqrt_ps(a); }
LP_INLINE vf load_n(const float* p, int n) { return _mm512_maskz_loadu_ps(__mmask16((1u << n) - 1), p); }  // n in 0..W, rest 0
LP_INLINE void store_n(float* p, vf v, int n) { _mm512_mask_storeu_ps(p, __mmask16((1u << n) - 1), v); }
LP_INLINE float sum(vf v) { return _mm512_reduce_add_ps(v); }
LP_INLINE float hmax(vf v) { return _mm512_reduce_max_ps(v); }
LP_INLINE vf load_half(const uint16_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
LP_INLINE void store_half(uint16_t* p, vf v) { _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT)); }
LP_INLINE vf round(vf a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
LP_INLINE vi to_int(vf a) { return _mm512_cvtps_epi32(a); }
LP_INLINE vf to_float(vi a) { return _mm512_cvtepi32_ps(a); }
LP_INLINE vi plus(vi a, vi b) { return _mm512_add_epi32(a, b); }
LP_INLINE vi max(vi a, vi b) { return _mm512_max_epi32(a, b); }
LP_INLINE int32_t sum(vi v) { return _mm512_reduce_add_epi32(v); }
LP_INLINE int32_t hmax(vi v) { return _mm512_reduce_max_epi32(v); }
LP_INLINE vf pow2(vf n) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127)), 23)); }
#elif defined(__AVX2__)
LP_INLINE vf set1(float x) { return _mm256_set1_ps(x); }
LP_INLINE vf zero() { return _mm256_setzero_ps(); }
LP_INLINE vf fma(vf a, vf b, vf c) { return _mm256_fmadd_ps(a, b, c); }
LP_INLINE vf max(vf a, vf b) { return _mm256_max_ps(a, b); }
LP_INLINE vf min(vf a, vf b) { return _mm256_min_ps(a, b); }
LP_INLINE vf abs(vf a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
LP_INLINE vf sqrt(vf a) { return _mm256_sqrt_ps(a); }
LP_INLINE vi lanes_below(int n) { return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7)); }
LP_INLINE vf load_n(const float* p, int n) { return _mm256_maskload_ps(p, lanes_below(n)); }
LP_INLINE void store_n(float* p, vf v, int n) { _mm256_maskstore_ps(p, lanes_below(n), v); }
LP_INLINE float sum(vf v) {
  __m128 a = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  a = _mm_add_ps(a, _mm_movehl_ps(a, a));
  return _mm_cvtss_f32(_mm_add_ss(a, _mm_movehdup_ps(a)));
}
LP_INLINE float hmax(vf v) {
  __m128 a = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  a = _mm_max_ps(a, _mm_movehl_ps(a, a));
  return _mm_cvtss_f32(_mm_max_ss(a, _mm_movehdup_ps(a)));
}
LP_INLINE vf load_half(const uint16_t* p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
LP_INLINE void store_half(uint16_t* p, vf v) { _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT)); }
LP_INLINE vf round(vf a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
LP_INLINE vi to_int(vf a) { return _mm256_cvtps_epi32(a); }
LP_INLINE vf to_float(vi a) { return _mm256_cvtepi32_ps(a); }
LP_INLINE vi plus(vi a, vi b) { return _mm256_add_epi32(a, b); }
LP_INLINE vi max(vi a, vi b) { return _mm256_max_epi32(a, b); }
LP_INLINE int32_t sum(vi v) {
  __m128i a = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  a = _mm_add_epi32(a, _mm_shuffle_epi32(a, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(a, _mm_shuffle_epi32(a, 0xb1)));
}
LP_INLINE int32_t hmax(vi v) {
  __m128i a = _mm_max_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  a = _mm_max_epi32(a, _mm_shuffle_epi32(a, 0x4e));
  return _mm_cvtsi128_si32(_mm_max_epi32(a, _mm_shuffle_epi32(a, 0xb1)));
}
LP_INLINE vf pow2(vf n) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23)); }
#else
LP_INLINE vf set1(float x) { return vf{x, x, x, x}; }
LP_INLINE vf zero() { return set1(0.0f); }
LP_INLINE vf fma(vf a, vf b, vf c) { return a * b + c; }
LP_INLINE vf max(vf a, vf b) { return a > b ? a : b; }
LP_INLINE vf min(vf a, vf b) { return a < b ? a : b; }
LP_INLINE vf abs(vf a) { vi i; memcpy(&i, &a, sizeof i); i &= 0x7fffffff; memcpy(&a, &i, sizeof a); return a; }
LP_INLINE vf sqrt(vf a) { for (int i = 0; i < W; i++) a[i] = __builtin_sqrtf(a[i]); return a; }
LP_INLINE vf load_n(const float* p, int n) { vf v = zero(); for (int i = 0; i < n; i++) v[i] = p[i]; return v; }
LP_INLINE void store_n(float* p, vf v, int n) { for (int i = 0; i < n; i++) p[i] = v[i]; }
LP_INLINE float sum(vf v) { return (v[0] + v[2]) + (v[1] + v[3]); }
LP_INLINE float hmax(vf v) { float a = v[0]; for (int i = 1; i < W; i++) a = v[i] > a ? v[i] : a; return a; }
LP_INLINE vf round(vf a) { for (int i = 0; i < W; i++) a[i] = __builtin_rintf(a[i]); return a; }
LP_INLINE vi to_int(vf a) { vi v; for (int i = 0; i < W; i++) v[i] = int32_t(__builtin_rintf(a[i])); return v; }
LP_INLINE vf to_float(vi a) { return __builtin_convertvector(a, vf); }
LP_INLINE vi plus(vi a, vi b) { return a + b; }
LP_INLINE vi max(vi a, vi b) { return a > b ? a : b; }
LP_INLINE int32_t sum(vi v) { return (v[0] + v[2]) + (v[1] + v[3]); }
LP_INLINE int32_t hmax(vi v) { int32_t a = v[0]; for (int i = 1; i < W; i++) a = v[i] > a ? v[i] : a; return a; }
LP_INLINE vf pow2(vf n) { vi i = (to_int(n) + 127) << 23; vf v; memcpy(&v, &i, sizeof v); return v; }
#endif

LP_INLINE vi bits(vf v) { vi i; memcpy(&i, &v, sizeof i); return i; }  // not negative: in the order of the numbers, then infinity, then NaN
LP_INLINE vf floats(vi v) { vf f; memcpy(&f, &v, sizeof f); return f; }

// fp16 <-> fp32 of one number, on any machine (round to nearest even; subnormals, infinities and NaN as IEEE says).
LP_INLINE float half_to_float(uint16_t h) {
  const uint32_t sign = uint32_t(h & 0x8000) << 16, rest = uint32_t(h & 0x7fff) << 13;
  const uint32_t exponent = rest & 0x0f800000;
  uint32_t out = rest + 0x38000000;
  if (exponent == 0x0f800000) out += 0x38000000;  // infinity, NaN
  else if (exponent == 0) {                         // zero, subnormal
    const float f = bits_float(int32_t(rest + 0x38800000)) - bits_float(0x38800000);
    memcpy(&out, &f, 4);
  }
  return bits_float(int32_t(out | sign));
}
LP_INLINE uint16_t float_to_half(float f) {
  uint32_t x; memcpy(&x, &f, 4);
  const uint32_t sign = (x >> 16) & 0x8000; x &= 0x7fffffff;
  if (x >= 0x47800000) return uint16_t(sign | (x > 0x7f800000 ? 0x7e00 : 0x7c00));
  if (x < 0x38800000) {  // subnormal result: let the adder round
    const float g = bits_float(int32_t(x)) + 0.5f; uint32_t y; memcpy(&y, &g, 4);
    return uint16_t(sign | (y - 0x3f000000));
  }
  return uint16_t(sign | ((x + 0xc8000fff + ((x >> 13) & 1)) >> 13));
}
#if !defined(__AVX2__)
LP_INLINE vf load_half(const uint16_t* p) { vf v; for (int i = 0; i < W; i++) v[i] = half_to_float(p[i]); return v; }
LP_INLINE void store_half(uint16_t* p, vf v) { for (int i = 0; i < W; i++) p[i] = float_to_half(v[i]); }
#endif

// e^x. Below -87.3 it answers 0 (so that a masked score of -inf weighs nothing), above 88.7 about 3e38.
LP_INLINE vf exp(vf x) {
  const vf kept = min(set1(88.37f), max(set1(-87.33f), x));  // in this order NaN stays NaN: x86 answers the second number
  const vf n = round(kept * set1(1.44269504f));
  vf r = fma(n, set1(-0.693359375f), kept);
  r = fma(n, set1(2.12194440e-4f), r);
  vf p = set1(1.9875691500e-4f);
  p = fma(p, r, set1(1.3981999507e-3f));
  p = fma(p, r, set1(8.3334519073e-3f));
  p = fma(p, r, set1(4.1665795894e-2f));
  p = fma(p, r, set1(1.6666665459e-1f));
  p = fma(p, r, set1(5.0000001201e-1f));
  p = fma(p, r * r, r) + set1(1.0f);
  p = p * pow2(n);
#if defined(__AVX512F__)
  return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, set1(-87.33f), _CMP_NLT_UQ), p);
#elif defined(__AVX2__)
  return _mm256_and_ps(p, _mm256_cmp_ps(x, set1(-87.33f), _CMP_NLT_UQ));
#else
  return x < set1(-87.33f) ? zero() : p;
#endif
}

LP_INLINE vf sigmoid(vf x) { return set1(1.0f) / (set1(1.0f) + exp(-x)); }
LP_INLINE vf silu(vf x) { return x * sigmoid(x); }
LP_INLINE vf tanh(vf x) { return set1(1.0f) - set1(2.0f) / (exp(x + x) + set1(1.0f)); }  // absolute error 2e-7; relative is worse near 0
LP_INLINE vf gelu_tanh(vf x) {
  const vf inner = set1(0.7978845608f) * fma(x * x * x, set1(0.044715f), x);
  return x * sigmoid(inner + inner);
}
LP_INLINE vf erf(vf x) {  // Abramowitz and Stegun 7.1.26, absolute error 1.5e-7
  const vf a = abs(x), t = set1(1.0f) / fma(a, set1(0.3275911f), set1(1.0f));
  vf p = fma(set1(1.061405429f), t, set1(-1.453152027f));
  p = fma(p, t, set1(1.421413741f));
  p = fma(p, t, set1(-0.284496736f));
  p = fma(p, t, set1(0.254829592f));
  const vf y = set1(1.0f) - p * t * exp(-a * a);
#if defined(__AVX512F__)
  return _mm512_mask_sub_ps(y, _mm512_cmp_ps_mask(x, zero(), _CMP_LT_OQ), zero(), y);
#elif defined(__AVX2__)
  return _mm256_or_ps(y, _mm256_and_ps(x, _mm256_set1_ps(-0.0f)));
#else
  return x < zero() ? -y : y;
#endif
}
LP_INLINE vf gelu(vf x) { return set1(0.5f) * x * (set1(1.0f) + erf(x * set1(0.70710678f))); }
LP_INLINE vf relu(vf x) { return max(x, zero()); }

}}  // namespace lilliput::LILLIPUT_ISA
