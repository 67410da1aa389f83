#include "roofline.h"

#include "vec.h"

namespace lilliput {
namespace LILLIPUT_ISA { namespace {

float read(const float* x, long count) {
  vf a[8];
  for (int i = 0; i < 8; i++) a[i] = zero();
  for (long k = 0; k + 8 * W <= count; k += 8 * W)
    for (int i = 0; i < 8; i++) a[i] = a[i] + load(x + k + i * W);
  vf total = zero();
  for (int i = 0; i < 8; i++) total = total + a[i];
  return sum(total);
}

float multiply(long rounds) {
  vf a[12];
  vf x = set1(0.999f), y = set1(1e-3f);
  for (int i = 0; i < 12; i++) a[i] = set1(float(i));
  for (long r = 0; r < rounds; r++) {
#pragma GCC unroll 12
    for (int i = 0; i < 12; i++) a[i] = fma(a[i], x, y);
    #if defined(__AVX2__)
    asm volatile("" : "+x"(x), "+x"(y));  // or the loop would be computed in closed form
#else
    asm volatile("" : "+m"(x), "+m"(y));
#endif
  }
  vf total = zero();
  for (int i = 0; i < 12; i++) total = total + a[i];
  return sum(total);
}

#if defined(__AVX512F__)
constexpr int BYTES = 64;
int32_t dot(long rounds) {
  __m512i a[8], w = _mm512_set1_epi8(3), x = _mm512_set1_epi8(5);
  for (int i = 0; i < 8; i++) a[i] = _mm512_set1_epi32(i);
  for (long r = 0; r < rounds; r++) {
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) a[i] = _mm512_dpbusd_epi32(a[i], w, x);
    asm volatile("" : "+v"(w), "+v"(x));
  }
  for (int i = 1; i < 8; i++) a[0] = _mm512_add_epi32(a[0], a[i]);
  return _mm512_reduce_add_epi32(a[0]);
}
#elif defined(__AVX2__)
constexpr int BYTES = 32;
int32_t dot(long rounds) {
  __m256i a[8], w = _mm256_set1_epi8(3), x = _mm256_set1_epi8(5), one = _mm256_set1_epi16(1);
  for (int i = 0; i < 8; i++) a[i] = _mm256_set1_epi32(i);
  for (long r = 0; r < rounds; r++) {
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) {
      a[i] = _mm256_add_epi32(a[i], _mm256_madd_epi16(_mm256_maddubs_epi16(w, x), one));
      asm volatile("" : "+x"(w), "+x"(x));
    }
  }
  for (int i = 1; i < 8; i++) a[0] = _mm256_add_epi32(a[0], a[i]);
  int32_t out[8];
  memcpy(out, &a[0], sizeof out);
  return out[0];
}
#else
constexpr int BYTES = 4;
int32_t dot(long rounds) {
  int32_t a[8] = {};
  int32_t w = 3, x = 5;
  for (long r = 0; r < rounds; r++)
    for (int i = 0; i < 8; i++) {
      a[i] += 4 * w * x;
      asm volatile("" : "+r"(w), "+r"(x));
    }
  for (int i = 1; i < 8; i++) a[0] += a[i];
  return a[0];
}
#endif

}}  // namespace LILLIPUT_ISA

extern const RooflineKernels LILLIPUT_TABLE(roofline) = {LILLIPUT_ISA::read, LILLIPUT_ISA::multiply, LILLIPUT_ISA::dot, LILLIPUT_ISA::W, LILLIPUT_ISA::BYTES};

}  // namespace lilliput
