// int8 rows times int8 or 4-bit panels, exact int32 sums of groups, one fp32 chain over the groups.
//
//     AVX-512   vpdpbusd takes u8 x s8: W8 becomes u8 by adding 128 (an xor), and the sums begin at -128 * (sum of the row's group)
//     AVX2      vpmaddubsw saturates at 32767. Nibbles (0..15) never reach it in a group of 32; W8 takes |w| and gives w's sign to x:
//               2 * 128 * 127 = 32512, which is why rows may not hold -128 (weights may)
//
// The epilogue of a group is the same everywhere: y = fma(float(sum), scale_x * scale_w, y), offsets y = fma(offset, scale_x * sum_x, y).
#include "linear.h"

#include "vec.h"

namespace lilliput {
namespace LILLIPUT_ISA { namespace {

#if defined(__AVX512F__)
constexpr int V = 1;  // vectors of a panel
#else
constexpr int V = PANEL / W;
#endif

struct Span {  // one panel's share of a weight
  const uint8_t* data;
  const uint8_t* scales;
  const uint8_t* offsets;
};

template <Format F>
LP_INLINE Span span(const Weight& w, int panel) {
  const long k = F == W8 ? (w.inputs + 3) / 4 * 4 : w.inputs / 2, groups = w.groups(), each = F == W8 ? 4 : 2;
  return {static_cast<const uint8_t*>(w.data) + panel * k * PANEL, static_cast<const uint8_t*>(w.scales) + panel * groups * PANEL * each,
          static_cast<const uint8_t*>(w.offsets) + panel * groups * PANEL * 2};
}

template <Format F>
LP_INLINE vf scale_of(const Span& s, int group, int v) {
  if (F == W8) return load(reinterpret_cast<const float*>(s.scales) + group * PANEL + v * W);
  return load_half(reinterpret_cast<const uint16_t*>(s.scales) + group * PANEL + v * W);
}
LP_INLINE vf offset_of(const Span& s, int group, int v) { return load_half(reinterpret_cast<const uint16_t*>(s.offsets) + group * PANEL + v * W); }

#if defined(__AVX2__)
LP_INLINE void fetch(const uint8_t* p) { _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T0); }  // beyond the end is no fault
#endif
LP_INLINE int32_t four(const int8_t* p) { int32_t i; memcpy(&i, p, 4); return i; }

#if defined(__AVX512F__)

struct Sums { vi v[1]; };
LP_INLINE Sums begin(int start) { return {{_mm512_set1_epi32(start)}}; }

// One row, one panel: four sums side by side, since a chain through one register would wait for itself.
template <Format F>
LP_INLINE vi dots_alone(vi start, const Span& s, const int8_t* x, int from, int to, long ahead) {
  const vi flip = _mm512_set1_epi8(char(0x80)), low = _mm512_set1_epi8(15);
  constexpr int STEP = F == W8 ? 4 : 8;
  vi acc[4] = {start, _mm512_setzero_si512(), _mm512_setzero_si512(), _mm512_setzero_si512()};
  int k = from;
  const auto add = [&](vi& sum, int at) {
    fetch(s.data + at * (F == W8 ? PANEL : PANEL / 2) + ahead);
    if (F == W8) {
      sum = _mm512_dpbusd_epi32(sum, _mm512_xor_si512(_mm512_loadu_si512(s.data + at * PANEL), flip), _mm512_set1_epi32(four(x + at)));
    } else {
      const vi w = _mm512_loadu_si512(s.data + at * (PANEL / 2));
      sum = _mm512_dpbusd_epi32(sum, _mm512_and_si512(w, low), _mm512_set1_epi32(four(x + at)));
      sum = _mm512_dpbusd_epi32(sum, _mm512_and_si512(_mm512_srli_epi16(w, 4), low), _mm512_set1_epi32(four(x + at + 4)));
    }
  };
  for (; k + 4 * STEP <= to; k += 4 * STEP)
    for (int u = 0; u < 4; u++) add(acc[u], k + u * STEP);
  for (; k < to; k += STEP) add(acc[0], k);
  return _mm512_add_epi32(_mm512_add_epi32(acc[0], acc[1]), _mm512_add_epi32(acc[2], acc[3]));
}

// 32 (Q4) or 4 (W8) inputs at `at`.. of one panel, added to the sums of MR rows.
template <int MR, int NP, Format F>
LP_INLINE void dots(Sums (&acc)[MR][NP], const Span* s, const int8_t* const* x, int from, int to, long ahead) {
  if (F == W8) {
    const vi flip = _mm512_set1_epi8(char(0x80));
    for (int k = from; k < to; k += 4) {
      vi w[NP];
      for (int j = 0; j < NP; j++) {
        fetch(s[j].data + k * PANEL + ahead);
        w[j] = _mm512_xor_si512(_mm512_loadu_si512(s[j].data + k * PANEL), flip);
      }
      for (int i = 0; i < MR; i++) {
        const vi a = _mm512_set1_epi32(four(x[i] + k));
        for (int j = 0; j < NP; j++) acc[i][j].v[0] = _mm512_dpbusd_epi32(acc[i][j].v[0], w[j], a);
      }
    }
  } else {
    const vi low = _mm512_set1_epi8(15);
    for (int k = from; k < to; k += 8) {
      vi lo[NP], hi[NP];
      for (int j = 0; j < NP; j++) {
        fetch(s[j].data + k * (PANEL / 2) + ahead);
        const vi w = _mm512_loadu_si512(s[j].data + k * (PANEL / 2));
        lo[j] = _mm512_and_si512(w, low);
        hi[j] = _mm512_and_si512(_mm512_srli_epi16(w, 4), low);
      }
      for (int i = 0; i < MR; i++) {
        const vi a = _mm512_set1_epi32(four(x[i] + k)), b = _mm512_set1_epi32(four(x[i] + k + 4));
        for (int j = 0; j < NP; j++) {
          acc[i][j].v[0] = _mm512_dpbusd_epi32(acc[i][j].v[0], lo[j], a);
          acc[i][j].v[0] = _mm512_dpbusd_epi32(acc[i][j].v[0], hi[j], b);
        }
      }
    }
  }
}

#elif defined(__AVX2__)

struct Sums { vi v[2]; };
LP_INLINE Sums begin(int start) { return {{_mm256_set1_epi32(start), _mm256_set1_epi32(start)}}; }

template <int MR, int NP, Format F>
LP_INLINE void dots(Sums (&acc)[MR][NP], const Span* s, const int8_t* const* x, int from, int to, long ahead) {
  const vi one = _mm256_set1_epi16(1);
  if (F == W8) {
    for (int k = from; k < to; k += 4)
      for (int j = 0; j < NP; j++) {
        vi w[2], size[2];
        fetch(s[j].data + k * PANEL + ahead);
        for (int v = 0; v < 2; v++) {
          w[v] = _mm256_loadu_si256(reinterpret_cast<const vi*>(s[j].data + k * PANEL + v * 32));
          size[v] = _mm256_abs_epi8(w[v]);
        }
        for (int i = 0; i < MR; i++) {
          const vi a = _mm256_set1_epi32(four(x[i] + k));
          for (int v = 0; v < 2; v++)
            acc[i][j].v[v] = _mm256_add_epi32(acc[i][j].v[v], _mm256_madd_epi16(_mm256_maddubs_epi16(size[v], _mm256_sign_epi8(a, w[v])), one));
        }
      }
  } else {
    const vi low = _mm256_set1_epi8(15);
    for (int first = from; first < to; first += 32) {  // 8 pairs of at most 3810 stay below 32767
      const int end = first + 32 < to ? first + 32 : to;
      vi narrow[MR][NP][2];
      for (int i = 0; i < MR; i++) for (int j = 0; j < NP; j++) narrow[i][j][0] = narrow[i][j][1] = _mm256_setzero_si256();
      for (int k = first; k < end; k += 8)
        for (int j = 0; j < NP; j++) {
          fetch(s[j].data + k * (PANEL / 2) + ahead);
          for (int v = 0; v < 2; v++) {
            const vi w = _mm256_loadu_si256(reinterpret_cast<const vi*>(s[j].data + k * (PANEL / 2) + v * 32));
            const vi lo = _mm256_and_si256(w, low), hi = _mm256_and_si256(_mm256_srli_epi16(w, 4), low);
            for (int i = 0; i < MR; i++) {
              const vi both = _mm256_add_epi16(_mm256_maddubs_epi16(lo, _mm256_set1_epi32(four(x[i] + k))),
                                               _mm256_maddubs_epi16(hi, _mm256_set1_epi32(four(x[i] + k + 4))));
              narrow[i][j][v] = _mm256_add_epi16(narrow[i][j][v], both);
            }
          }
        }
      for (int i = 0; i < MR; i++)
        for (int j = 0; j < NP; j++)
          for (int v = 0; v < 2; v++) acc[i][j].v[v] = _mm256_add_epi32(acc[i][j].v[v], _mm256_madd_epi16(narrow[i][j][v], one));
    }
  }
}

#else

struct Sums { vi v[V]; };
LP_INLINE Sums begin(int start) { Sums s; for (int v = 0; v < V; v++) s.v[v] = vi{start, start, start, start}; return s; }

template <int MR, int NP, Format F>
LP_INLINE void dots(Sums (&acc)[MR][NP], const Span* s, const int8_t* const* x, int from, int to, long) {
  for (int j = 0; j < NP; j++)
    for (int k = from; k < to; k++)
      for (int c = 0; c < PANEL; c++) {
        int w;
        if (F == W8) w = reinterpret_cast<const int8_t*>(s[j].data)[(k / 4) * 4 * PANEL + c * 4 + k % 4];
        else { const uint8_t b = s[j].data[(k / 8) * 4 * PANEL + c * 4 + k % 4]; w = k % 8 < 4 ? b & 15 : b >> 4; }
        for (int i = 0; i < MR; i++) acc[i][j].v[c / W][c % W] += w * x[i][k];
      }
}

#endif

// MR rows x NP panels. ahead: bytes from what is read to what should come into the cache meanwhile; 0: nothing.
template <int MR, int NP, Format F, Offset O>
void block(const Weight& w, const Rows8& x, int row, int panel, const float* bias, float* y, long y_stride, bool add, long ahead) {
  Span s[NP];
  const int8_t* rows[MR];
  for (int j = 0; j < NP; j++) s[j] = span<F>(w, panel + j);
  for (int i = 0; i < MR; i++) rows[i] = x.q + long(row + i) * x.stride;
  vf out[MR][NP][V];
  for (int i = 0; i < MR; i++) for (int j = 0; j < NP; j++) for (int v = 0; v < V; v++) out[i][j][v] = zero();
  const int groups = w.groups(), padded = F == W8 ? (w.inputs + 3) / 4 * 4 : w.inputs, size = w.group ? w.group : padded;
  for (int g = 0; g < groups; g++) {
    Sums acc[MR][NP];
    for (int i = 0; i < MR; i++) {
      const int start = O == SYMMETRIC ? x.extra[long(row + i) * x.groups + g] : 0;
      for (int j = 0; j < NP; j++) acc[i][j] = begin(start);
    }
#if defined(__AVX512F__)
    if (MR == 1) { for (int j = 0; j < NP; j++) acc[0][j].v[0] = dots_alone<F>(acc[0][j].v[0], s[j], rows[0], g * size, g * size + size, ahead); }
    else
#endif
    dots<MR, NP, F>(acc, s, rows, g * size, g * size + size, ahead);
    for (int j = 0; j < NP; j++)
      for (int v = 0; v < V; v++) {
        const vf scale = scale_of<F>(s[j], g, v);
        vf offset = zero();
        if (F == Q4 && O == MINS) offset = offset_of(s[j], g, v);
        if (F == Q4 && O == ZEROS) offset = zero() - scale * offset_of(s[j], g, v);
        for (int i = 0; i < MR; i++) {
          const float sx = x.scales[long(row + i) * x.groups + g];
          out[i][j][v] = fma(to_float(acc[i][j].v[v]), set1(sx) * scale, out[i][j][v]);
          if (F == Q4 && O != SYMMETRIC) out[i][j][v] = fma(offset, set1(bits_float(x.extra[long(row + i) * x.groups + g])), out[i][j][v]);
        }
      }
  }
  for (int j = 0; j < NP; j++)
    for (int v = 0; v < V; v++) {
      const int column = (panel + j) * PANEL + v * W, n = w.outputs - column < W ? w.outputs - column : W;
      if (n <= 0) continue;
      const vf b = !bias ? zero() : n == W ? load(bias + column) : load_n(bias + column, n);
      for (int i = 0; i < MR; i++) {
        float* to = y + long(row + i) * y_stride + column;
        vf value = out[i][j][v] + b;
        if (n == W) { if (add) value = load(to) + value; store(to, value); }
        else { if (add) value = load_n(to, n) + value; store_n(to, value, n); }
      }
    }
}

#if defined(__AVX512F__)
constexpr int ROWS = 12, WIDE = 1;  // rows x panels of the main block
#elif defined(__AVX2__)
constexpr int ROWS = 4, WIDE = 1;
#else
constexpr int ROWS = 4, WIDE = 1;
#endif

constexpr int NEAR = 4;       // panels that stay in the nearest cache while all rows pass
constexpr long SOON = 2048;   // bytes: a single row is one stream through the panels, bound by memory

// A single row takes one panel at a time: several side by side would be as many streams, each too short for the hardware's prefetch.
template <int MR, Format F, Offset O>
void rows_of(const Weight& w, const Rows8& x, int row, int p0, int p1, const float* bias, float* y, long y_stride, bool add, long ahead) {
  constexpr int NP = MR == 1 ? 1 : WIDE;
  for (; p0 + NP <= p1; p0 += NP) block<MR, NP, F, O>(w, x, row, p0, bias, y, y_stride, add, ahead);
  for (; p0 < p1; p0++) block<MR, 1, F, O>(w, x, row, p0, bias, y, y_stride, add, ahead);
}

template <Format F, Offset O>
void tiles(const Weight& w, const Rows8& x, int r0, int r1, int p0, int p1, const float* bias, float* y, long y_stride, bool add) {
  if (r1 - r0 == 1) return rows_of<1, F, O>(w, x, r0, p0, p1, bias, y, y_stride, add, SOON);
  const long next = NEAR * (static_cast<const uint8_t*>(span<F>(w, 1).data) - static_cast<const uint8_t*>(w.data));
  for (int p = p0; p < p1; p += NEAR) {
    const int q = p + NEAR < p1 ? p + NEAR : p1;
    const int blocks = (r1 - r0 + ROWS - 1) / ROWS;
    for (int i = 0, r = r0; i < blocks; i++) {  // of nearly equal height: what a block reads and unpacks is spread over its rows
      const int rows = (r1 - r + blocks - i - 1) / (blocks - i);
      const long ahead = r == r0 ? next : 0;
      switch (rows) {
#define ROWS_OF(n) case n: rows_of<n, F, O>(w, x, r, p, q, bias, y, y_stride, add, ahead); break;
        ROWS_OF(1) ROWS_OF(2) ROWS_OF(3) ROWS_OF(4)
#if defined(__AVX512F__)
        ROWS_OF(5) ROWS_OF(6) ROWS_OF(7) ROWS_OF(8) ROWS_OF(9) ROWS_OF(10) ROWS_OF(11) ROWS_OF(12)
#endif
#undef ROWS_OF
        default: break;
      }
      r += rows;
    }
  }
}

void tile(const Weight& w, const Rows8& x, int r0, int r1, int p0, int p1, const float* bias, float* y, long y_stride, bool add) {
  if (w.format == W8) tiles<W8, SYMMETRIC>(w, x, r0, r1, p0, p1, bias, y, y_stride, add);
  else if (w.offset == SYMMETRIC) tiles<Q4, SYMMETRIC>(w, x, r0, r1, p0, p1, bias, y, y_stride, add);
  else if (w.offset == MINS) tiles<Q4, MINS>(w, x, r0, r1, p0, p1, bias, y, y_stride, add);
  else tiles<Q4, ZEROS>(w, x, r0, r1, p0, p1, bias, y, y_stride, add);
}

LP_INLINE void store_bytes(int8_t* p, vi v) {
#if defined(__AVX512F__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(v));
#elif defined(__AVX2__)
  const __m128i halves = _mm_packs_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(halves, halves));
#else
  for (int i = 0; i < W; i++) { int32_t n; memcpy(&n, reinterpret_cast<const char*>(&v) + 4 * i, 4); p[i] = int8_t(n); }
#endif
}

constexpr int BATCH = 64;  // groups whose scales are made together

// A group with a number that is not finite gets the scale NaN, so that its row answers NaN and no other does.
void quantize(const Weight& w, const float* x, long x_stride, int r0, int r1, const float* given, const Rows8& to) {
  const int size = w.group ? w.group : w.inputs;
  const vf most_q = set1(127.0f), least_q = set1(-127.0f);
#if defined(__AVX512F__)
  const int start = w.format == W8 ? -128 : -8;
#else
  const int start = w.format == W8 ? 0 : -8;
#endif
  for (int r = r0; r < r1; r++) {
    const float* row = x + r * x_stride;
    int8_t* q = to.q + long(r) * to.stride;
    float* scales = to.scales + long(r) * to.groups;
    int32_t* extra = to.extra + long(r) * to.groups;
    for (int g0 = 0; g0 < to.groups; g0 += BATCH) {
      const int count = to.groups - g0 < BATCH ? to.groups - g0 : BATCH;
      float tops[BATCH], inverses[BATCH];
      for (int g = 0; g < count; g++) {
        const float* from = row + long(g0 + g) * size;
        vi most = bits(zero());  // of |x|, as bits: NaN is above infinity, and it is found with the same comparison
        int k = 0;
        for (; k + W <= size; k += W) most = max(most, bits(abs(load(from + k))));
        if (k < size) most = max(most, bits(abs(load_n(from + k, size - k))));
        tops[g] = bits_float(hmax(most));
      }
      for (int g = 0; g < count; g++) {
        const float top = tops[g], scale = given ? given[g0 + g] : top / 127.0f, inverse = given ? 1.0f / scale : 127.0f / top;
        inverses[g] = (given ? scale : top) <= 1e-30f ? 0.0f : inverse;  // below, it would be infinite
        scales[g0 + g] = top <= 3.4028235e38f ? scale : bits_float(0x7fc00000);
      }
      for (int g = 0; g < count; g++) {
        const float* from = row + long(g0 + g) * size;
        int8_t* out = q + long(g0 + g) * size;
        const vf inverse = set1(inverses[g]);
        vi total = bits(zero());
        for (int k = 0; k < size; k += W) {
          const int n = size - k < W ? size - k : W;
          const vf v = n == W ? load(from + k) : load_n(from + k, n);
          const vi rounded = to_int(max(min(v * inverse, most_q), least_q));  // in this order NaN becomes 127
          total = plus(total, rounded);
          if (n == W) store_bytes(out + k, rounded);
          else { int8_t rest[PANEL]; store_bytes(rest, rounded); memcpy(out + k, rest, size_t(n)); }
        }
        const int32_t sums = sum(total);
        if (w.offset == SYMMETRIC) extra[g0 + g] = start * sums;
        else { const float share = scales[g0 + g] * float(sums); memcpy(extra + g0 + g, &share, 4); }
      }
    }
    if (to.stride > w.inputs) memset(q + w.inputs, 0, size_t(to.stride - w.inputs));
  }
}

}}  // namespace LILLIPUT_ISA

extern const IntKernels LILLIPUT_TABLE(linear_int) = {LILLIPUT_ISA::quantize, LILLIPUT_ISA::tile};

}  // namespace lilliput
