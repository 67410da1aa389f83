#include "pages.h"

#include "vec.h"

namespace lilliput {
namespace LILLIPUT_ISA { namespace {

constexpr long PAGE = 4096;

typedef uint64_t words __attribute__((vector_size(64)));  // a cache line: one register in AVX-512, two in AVX2, four elsewhere

LP_INLINE void stream(char* into, const words& x) {  // past the caches; `into` begins on a line
#if defined(__AVX512F__)
  _mm512_stream_si512((__m512i*)into, (__m512i)x);
#elif defined(__AVX2__)
  __m256i halves[2];
  memcpy(halves, &x, sizeof x);
  _mm256_stream_si256((__m256i*)into, halves[0]);
  _mm256_stream_si256((__m256i*)into + 1, halves[1]);
#else
  memcpy(into, &x, sizeof x);
#endif
}

template <bool COPY>
LP_INLINE void line(words& sum, const char* from, char* into) {
  words x;
  memcpy(&x, from, sizeof x);
  sum += x;
  if (COPY) stream(into, x);
}

template <bool COPY>
uint64_t whole_page(const char* from, char* into) {
  words a = {}, b = {}, c = {}, d = {};  // four chains of sums
  for (long k = 0; k < PAGE; k += 256) {
    line<COPY>(a, from + k, into + k);
    line<COPY>(b, from + k + 64, into + k + 64);
    line<COPY>(c, from + k + 128, into + k + 128);
    line<COPY>(d, from + k + 192, into + k + 192);
  }
  const words all = (a + b) + (c + d);
  uint64_t total = 0;
  for (int i = 0; i < 8; i++) total += all[i];
  return total;
}

// Bytes of a page one by one: of its last, unfinished part, and where a cache line of `into` does not begin on one.
uint64_t part_of_page(const char* from, char* into, long count) {
  uint64_t total = 0;
  for (long k = 0; k < count; k += 8) {
    uint64_t word = 0;
    memcpy(&word, from + k, count - k < 8 ? size_t(count - k) : 8);
    total += word;
  }
  if (into) memcpy(into, from, size_t(count));
  return total;
}

uint64_t checksum(const char* from, char* into, long count) {
  const bool lines = uintptr_t(into) % sizeof(words) == 0;
  uint64_t total = 0;
  for (long k = 0; k < count; k += PAGE) {
    const long left = count - k < PAGE ? count - k : PAGE;
    char* const to = into ? into + k : nullptr;
    total += uint64_t(2 * (k / PAGE) + 1) * (left < PAGE || !lines ? part_of_page(from + k, to, left) : into ? whole_page<true>(from + k, to) : whole_page<false>(from + k, to));
  }
#if defined(__AVX2__) || defined(__AVX512F__)
  if (into) _mm_sfence();  // streamed lines are there for whoever is told so next
#endif
  return total;
}

}}  // namespace LILLIPUT_ISA

extern const PagesKernels LILLIPUT_TABLE(pages) = {LILLIPUT_ISA::checksum};

}  // namespace lilliput
