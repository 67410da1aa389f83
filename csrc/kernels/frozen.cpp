// NF4: the 16 levels times a block's scale once (16 products for 64 weights), then 64 look-ups by nibble.
#include "frozen.h"

#include "nf4.h"
#include "vec.h"

namespace lilliput {
namespace LILLIPUT_ISA { namespace {

LP_INLINE float widened(float x) { return x; }
LP_INLINE float widened(uint16_t x) { return half_to_float(x); }

template <class T>
LP_INLINE float of_block(const PerBlock<T>& s, long block) {
  return s.plain ? widened(s.plain[block]) : float(s.q[block]) * s.steps[block / SECOND] + s.mean;
}

LP_INLINE vi bytes(const uint8_t* p) {  // W of them, one a lane
#if defined(__AVX512F__)
  return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#elif defined(__AVX2__)
  return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
#else
  return vi{p[0], p[1], p[2], p[3]};
#endif
}

#if defined(__AVX512F__)
LP_INLINE vi low(vi n) { return _mm512_and_si512(n, _mm512_set1_epi32(15)); }
LP_INLINE vi high(vi n) { return _mm512_srli_epi32(n, 4); }

LP_INLINE void nf4_block(float scale, const uint8_t* numbers, float* out) {
  const vf table = load(NF4_LEVELS) * set1(scale);
  const vi first = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const vi last = _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
  for (int i = 0; i < NF4_BLOCK / 2; i += W) {
    const vi n = bytes(numbers + i);  // the look-up reads 4 bits of a lane
    const vf even = _mm512_permutexvar_ps(high(n), table), odd = _mm512_permutexvar_ps(n, table);
    store(out + 2 * i, _mm512_permutex2var_ps(even, first, odd));
    store(out + 2 * i + W, _mm512_permutex2var_ps(even, last, odd));
  }
}
#elif defined(__AVX2__)
LP_INLINE vi low(vi n) { return _mm256_and_si256(n, _mm256_set1_epi32(15)); }
LP_INLINE vi high(vi n) { return _mm256_srli_epi32(n, 4); }

LP_INLINE void nf4_block(float scale, const uint8_t* numbers, float* out) {
  const vf below = load(NF4_LEVELS) * set1(scale), above = load(NF4_LEVELS + W) * set1(scale);
  for (int i = 0; i < NF4_BLOCK / 2; i += W) {
    const vi n = bytes(numbers + i);
    const vf even = look_up(below, above, high(n)), odd = look_up(below, above, n);
    const vf a = _mm256_unpacklo_ps(even, odd), b = _mm256_unpackhi_ps(even, odd);
    store(out + 2 * i, _mm256_permute2f128_ps(a, b, 0x20));
    store(out + 2 * i + W, _mm256_permute2f128_ps(a, b, 0x31));
  }
}
#else
LP_INLINE vi low(vi n) { return n & 15; }
LP_INLINE vi high(vi n) { return n >> 4; }

LP_INLINE void nf4_block(float scale, const uint8_t* numbers, float* out) {
  float table[16];
  for (int i = 0; i < 16; i++) table[i] = NF4_LEVELS[i] * scale;
  for (int i = 0; i < NF4_BLOCK / 2; i++) {
    out[2 * i] = table[numbers[i] >> 4];
    out[2 * i + 1] = table[numbers[i] & 15];
  }
}
#endif

void nf4(const Nf4Matrix& m, float* out, long from, long to) {
  for (long b = from; b < to; b++) {
    const float scale = of_block(m.scales, b);
    nf4_block(scale < 0.0f ? 0.0f : scale, m.numbers + b * (NF4_BLOCK / 2), out + b * NF4_BLOCK);
  }
}

void q4(const Q4Matrix& m, float* out, long from, long to) {
  constexpr int HALF = Q4_BLOCK / 2;
  for (long b = from; b < to; b++) {
    const vf scale = set1(of_block(m.scales, b)), offset = set1(of_block(m.offsets, b));
    for (int i = 0; i < HALF; i += W) {
      const vi n = bytes(m.numbers + b * HALF + i);
      store(out + b * Q4_BLOCK + i, scale * to_float(low(n)) + offset);
      store(out + b * Q4_BLOCK + HALF + i, scale * to_float(high(n)) + offset);
    }
  }
}

}}  // namespace LILLIPUT_ISA

extern const FrozenKernels LILLIPUT_TABLE(frozen) = {LILLIPUT_ISA::nf4, LILLIPUT_ISA::q4};

}  // namespace lilliput
