// fp32 rows times panels in any format: numbers are widened to fp32 as they are read, scale applied, then one fma chain over the inputs
// in rising order. So the result is, bit for bit, that of multiplying by the decoded fp32 matrix in that order, for any number of rows.
//
// Up to a few rows the panel is decoded in registers; for more, a chunk of it is decoded once into scratch and serves all rows.
#include "linear.h"

#include "nf4.h"
#include "vec.h"

namespace lilliput {
namespace LILLIPUT_ISA { namespace {

constexpr int V = PANEL / W;  // vectors of 16 outputs
constexpr int CHUNK = 128;    // inputs decoded at a time: 8 KiB of scratch

struct Panel {
  const uint8_t* data;
  const uint8_t* scales;
  const uint8_t* offsets;
  int group;
};

template <Format F>
LP_INLINE Panel panel_of(const Weight& w, int p) {
  const long k = F == W8 ? (w.inputs + 3) / 4 * 4 : w.inputs, groups = w.groups();
  const long bytes = F == F32 ? 4 * k * PANEL : F == F16 ? 2 * k * PANEL : F == Q4 || F == NF4 ? k * PANEL / 2 : k * PANEL;
  const long scale = F == Q4 || F == NF4 ? 2 : 4;
  return {static_cast<const uint8_t*>(w.data) + p * bytes, static_cast<const uint8_t*>(w.scales) + p * groups * PANEL * scale,
          static_cast<const uint8_t*>(w.offsets) + p * groups * PANEL * 2, w.group};
}

// Byte `at` of 16 consecutive 4-byte lanes as integers, shifted right by `shift` inside the lane.
LP_INLINE vi lanes(const uint8_t* p) { vi v; memcpy(&v, p, sizeof v); return v; }
#if defined(__AVX512F__)
LP_INLINE vi shift_right(vi v, int n) { return _mm512_srli_epi32(v, unsigned(n)); }
LP_INLINE vi shift_left(vi v, int n) { return _mm512_slli_epi32(v, unsigned(n)); }
LP_INLINE vi shift_signed(vi v, int n) { return _mm512_srai_epi32(v, unsigned(n)); }
LP_INLINE vi mask(vi v, int m) { return _mm512_and_si512(v, _mm512_set1_epi32(m)); }
LP_INLINE vi signed_bytes(const uint8_t* p) { return _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
LP_INLINE vf level(vi n) { return _mm512_permutexvar_ps(n, load(NF4_LEVELS)); }
#elif defined(__AVX2__)
LP_INLINE vi shift_right(vi v, int n) { return _mm256_srli_epi32(v, n); }
LP_INLINE vi shift_left(vi v, int n) { return _mm256_slli_epi32(v, n); }
LP_INLINE vi shift_signed(vi v, int n) { return _mm256_srai_epi32(v, n); }
LP_INLINE vi mask(vi v, int m) { return _mm256_and_si256(v, _mm256_set1_epi32(m)); }
LP_INLINE vi signed_bytes(const uint8_t* p) { return _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))); }
LP_INLINE vf level(vi n) { return look_up(load(NF4_LEVELS), load(NF4_LEVELS + W), n); }
#else
LP_INLINE vi shift_right(vi v, int n) { typedef uint32_t vu __attribute__((vector_size(16))); return (vi)((vu)v >> n); }
LP_INLINE vi shift_left(vi v, int n) { return v << n; }
LP_INLINE vi shift_signed(vi v, int n) { return v >> n; }
LP_INLINE vi mask(vi v, int m) { return v & m; }
LP_INLINE vi signed_bytes(const uint8_t* p) { vi v; for (int i = 0; i < W; i++) v[i] = int8_t(p[i]); return v; }
LP_INLINE vf level(vi n) { vf f; for (int i = 0; i < W; i++) f[i] = NF4_LEVELS[n[i]]; return f; }
#endif

// Vector v of the 16 numbers of input k.
template <Format F, Offset O>
LP_INLINE vf number(const Panel& p, int k, int v) {
  const long group = p.group ? k / p.group : 0, at = group * PANEL + v * W;
  if (F == F32) return load(reinterpret_cast<const float*>(p.data) + long(k) * PANEL + v * W);
  if (F == F16) return load_half(reinterpret_cast<const uint16_t*>(p.data) + long(k) * PANEL + v * W);
  if (F == W8) {
    const vi q = shift_signed(shift_left(lanes(p.data + long(k / 4) * 4 * PANEL + v * W * 4), 24 - 8 * (k % 4)), 24);
    return to_float(q) * load(reinterpret_cast<const float*>(p.scales) + at);
  }
  if (F == Q4 || F == NF4) {
    const vi n = mask(shift_right(lanes(p.data + long(k / 8) * 4 * PANEL + v * W * 4), 8 * (k % 4) + (k % 8 < 4 ? 0 : 4)), 15);
    const vf s = load_half(reinterpret_cast<const uint16_t*>(p.scales) + at);
    if (F == NF4) return level(n) * s;
    if (O == SYMMETRIC) return s * (to_float(n) - set1(8.0f));
    const vf o = load_half(reinterpret_cast<const uint16_t*>(p.offsets) + at);
    return O == MINS ? s * to_float(n) + o : s * (to_float(n) - o);
  }
  // FP8: the bits move to fp32's places and a factor of 2^120 (E4M3) or 2^112 (E5M2) mends the exponent; subnormals come out right
  const vi bits = signed_bytes(p.data + long(k) * PANEL + v * W);
  const vf scale = load(reinterpret_cast<const float*>(p.scales) + v * W);
  if (F == E4M3) return floats(mask(shift_left(bits, 20), int32_t(0x87f00000))) * set1(1.329227995784916e36f) * scale;
  return floats(mask(shift_left(bits, 21), int32_t(0x8fe00000))) * set1(5.192296858534828e33f) * scale;
}

// acc[i][v] += numbers of inputs [from, to) times row i. DECODED: the numbers lie in `wide`, [to - from][16]; else they are decoded here from p.
template <int MR, int NP, Format F, Offset O, bool DECODED = false>
LP_INLINE void chain(vf (&acc)[MR][NP][V], const Panel* p, const float* wide, long wide_stride, const float* const* x, int from, int to) {
  for (int k = from; k < to; k++) {
    vf w[NP][V];
    for (int j = 0; j < NP; j++)
      for (int v = 0; v < V; v++) w[j][v] = DECODED ? load(wide + j * wide_stride + long(k - from) * PANEL + v * W) : number<F, O>(p[j], k, v);
    for (int i = 0; i < MR; i++) {
      const vf a = set1(x[i][k]);
      for (int j = 0; j < NP; j++)
        for (int v = 0; v < V; v++) acc[i][j][v] = fma(a, w[j][v], acc[i][j][v]);
    }
  }
}

template <int MR, int NP>
LP_INLINE void finish(const vf (&acc)[MR][NP][V], const Weight& w, int row, int panel, const float* bias, float* y, long y_stride, bool add) {
  for (int j = 0; j < NP; j++)
    for (int v = 0; v < V; v++) {
      const int column = (panel + j) * PANEL + v * W, n = w.outputs - column < W ? w.outputs - column : W;
      if (n <= 0) continue;
      const vf b = !bias ? zero() : n == W ? load(bias + column) : load_n(bias + column, n);
      for (int i = 0; i < MR; i++) {
        float* to = y + long(row + i) * y_stride + column;
        vf value = acc[i][j][v] + b;
        if (n == W) { if (add) value = load(to) + value; store(to, value); }
        else { if (add) value = load_n(to, n) + value; store_n(to, value, n); }
      }
    }
}

template <int MR, int NP, Format F, Offset O>
void block(const Weight& w, const float* x, long x_stride, int row, int panel, const float* bias, float* y, long y_stride, bool add) {
  Panel p[NP];
  const float* rows[MR];
  for (int j = 0; j < NP; j++) p[j] = panel_of<F>(w, panel + j);
  for (int i = 0; i < MR; i++) rows[i] = x + (row + i) * x_stride;
  vf acc[MR][NP][V];
  for (int i = 0; i < MR; i++) for (int j = 0; j < NP; j++) for (int v = 0; v < V; v++) acc[i][j][v] = zero();
  if (F == Q4 || F == NF4 || F == W8) {  // loops of 8 unroll, and the shifts become constants
    int k = 0;
    for (; k + 8 <= w.inputs; k += 8)
#pragma GCC unroll 8
      for (int u = 0; u < 8; u++) chain<MR, NP, F, O>(acc, p, nullptr, 0, rows, k + u, k + u + 1);
    chain<MR, NP, F, O>(acc, p, nullptr, 0, rows, k, w.inputs);
  } else {
    chain<MR, NP, F, O>(acc, p, nullptr, 0, rows, 0, w.inputs);
  }
  finish<MR, NP>(acc, w, row, panel, bias, y, y_stride, add);
}

#if defined(__AVX512F__)
constexpr int ROWS = 8, WIDE = 3, ALONE = 8;  // 24 sums, 3 weights, 1 x: 28 of 32 registers
#elif defined(__AVX2__)
constexpr int ROWS = 6, WIDE = 1, ALONE = 4;  // 12 sums of 16 registers
#else
constexpr int ROWS = 2, WIDE = 1, ALONE = 1;
#endif
constexpr int ASKED = 16;  // inputs between two requests for what is wanted next
constexpr int FEW = 3;  // rows below which decoding in registers is cheaper

// Rows from..: a chunk of the inputs for NP panels whose decoded numbers lie in `wide`, `apart` numbers from panel to panel; sums wait between
// chunks. soon: bytes that are wanted next, `each` an input, asked for meanwhile, into the nearest cache (NEAR) or the next one; null: nothing.
template <int MR, int NP, bool NEAR>
void decoded(const float* wide, long apart, const float* x, long x_stride, int row, int from, int to, float* sums, bool first, const uint8_t* const* soon, int each) {
  const float* rows[MR];
  for (int i = 0; i < MR; i++) rows[i] = x + (row + i) * x_stride;
  vf acc[MR][NP][V];
  for (int i = 0; i < MR; i++)
    for (int j = 0; j < NP; j++)
      for (int v = 0; v < V; v++) acc[i][j][v] = first ? zero() : load(sums + (long(row + i) * NP + j) * PANEL + v * W);
  if (!soon) chain<MR, NP, F32, SYMMETRIC, true>(acc, nullptr, wide, apart, rows, from, to);
  else
    for (int k = from; k < to; k += ASKED) {
      const int end = k + ASKED < to ? k + ASKED : to;
      for (int j = 0; j < NP; j++)
        for (int b = (k - from) * each; b < (end - from) * each; b += 64) __builtin_prefetch(soon[j] + b, 0, NEAR ? 3 : 2);
      chain<MR, NP, F32, SYMMETRIC, true>(acc, nullptr, wide + long(k - from) * PANEL, apart, rows, k, end);
    }
  for (int i = 0; i < MR; i++)
    for (int j = 0; j < NP; j++)
      for (int v = 0; v < V; v++) store(sums + (long(row + i) * NP + j) * PANEL + v * W, acc[i][j][v]);
}

constexpr int TALL = 96;  // rows of a tile at most: what linear.cpp cuts, and the sums' scratch

template <int NP, Format F, Offset O>
void many(const Weight& w, const float* x, long x_stride, int r0, int r1, int panel, const float* bias, float* y, long y_stride, bool add) {
  alignas(64) float wide[NP * CHUNK * PANEL];
  alignas(64) float sums[TALL * NP * PANEL];
  Panel p[NP];
  for (int j = 0; j < NP; j++) p[j] = panel_of<F>(w, panel + j);
  constexpr int STRETCH = F == F32 ? 4 * CHUNK : CHUNK;  // fp32 numbers are used where they lie: longer, and not through the nearest cache
  for (int from = 0; from < w.inputs; from += STRETCH) {
    const int to = from + STRETCH < w.inputs ? from + STRETCH : w.inputs;
    const float* numbers = wide;
    long apart = long(CHUNK) * PANEL;
    if (F == F32) {  // they lie there as they are wanted
      numbers = reinterpret_cast<const float*>(p[0].data) + long(from) * PANEL;
      apart = long(w.inputs) * PANEL;
    } else {
      for (int j = 0; j < NP; j++)
        for (int k = from; k < to; k++)
          for (int v = 0; v < V; v++) store(wide + (long(j) * CHUNK + k - from) * PANEL + v * W, number<F, O>(p[j], k, v));
    }
    const uint8_t* soon[NP];  // the next chunk of these panels, or the first of the next ones; what lies beyond the end is no fault
    const int each = F == F32 ? 4 * PANEL : F == F16 ? 2 * PANEL : F == W8 || F == E4M3 || F == E5M2 ? PANEL : PANEL / 2;
    for (int j = 0; j < NP; j++)
      soon[j] = to < w.inputs ? static_cast<const uint8_t*>(p[j].data) + long(to) * each : static_cast<const uint8_t*>(panel_of<F>(w, panel + NP + j).data);
    const int blocks = (r1 - r0 + ROWS - 1) / ROWS;
    for (int i = 0, r = r0; i < blocks; i++) {  // of nearly equal height
      const int rows = (r1 - r + blocks - i - 1) / (blocks - i);
      const uint8_t* const* asked = i == 0 ? soon : nullptr;
      float* base = sums - long(r0) * NP * PANEL;
      switch (rows) {
#define ROWS_OF(n) case n: decoded<n, NP, F != F32>(numbers, apart, x, x_stride, r, from, to, base, from == 0, asked, each); break;
        ROWS_OF(1) ROWS_OF(2)
#if defined(__AVX2__)
        ROWS_OF(3) ROWS_OF(4) ROWS_OF(5) ROWS_OF(6)
#endif
#if defined(__AVX512F__)
        ROWS_OF(7) ROWS_OF(8)
#endif
#undef ROWS_OF
        default: break;
      }
      r += rows;
    }
  }
  for (int r = r0; r < r1; r++) {
    vf acc[1][NP][V];
    for (int j = 0; j < NP; j++) for (int v = 0; v < V; v++) acc[0][j][v] = load(sums + (long(r - r0) * NP + j) * PANEL + v * W);
    finish<1, NP>(acc, w, r, panel, bias, y, y_stride, add);
  }
}

template <int MR, int NP, Format F, Offset O>
void across(const Weight& w, const float* x, long x_stride, int row, int p0, int p1, const float* bias, float* y, long y_stride, bool add) {
  for (; p0 + NP <= p1; p0 += NP) block<MR, NP, F, O>(w, x, x_stride, row, p0, bias, y, y_stride, add);
  for (; p0 < p1; p0++) block<MR, 1, F, O>(w, x, x_stride, row, p0, bias, y, y_stride, add);
}

template <Format F, Offset O>
void tiles(const Weight& w, const float* x, long x_stride, int r0, int r1, int p0, int p1, const float* bias, float* y, long y_stride, bool add) {
  if (r1 - r0 <= FEW) {
    switch (r1 - r0) {
      case 1: return across<1, ALONE, F, O>(w, x, x_stride, r0, p0, p1, bias, y, y_stride, add);
      case 2: return across<2, WIDE, F, O>(w, x, x_stride, r0, p0, p1, bias, y, y_stride, add);
      default: return across<3, WIDE, F, O>(w, x, x_stride, r0, p0, p1, bias, y, y_stride, add);
    }
  }
  for (; r0 < r1; r0 += TALL) {
    const int end = r0 + TALL < r1 ? r0 + TALL : r1;
    int p = p0;
    for (; p + WIDE <= p1; p += WIDE) many<WIDE, F, O>(w, x, x_stride, r0, end, p, bias, y, y_stride, add);
    for (; p < p1; p++) many<1, F, O>(w, x, x_stride, r0, end, p, bias, y, y_stride, add);
  }
}

void tile(const Weight& w, const float* x, long x_stride, int r0, int r1, int p0, int p1, const float* bias, float* y, long y_stride, bool add) {
  switch (w.format) {
    case F32: return tiles<F32, SYMMETRIC>(w, x, x_stride, r0, r1, p0, p1, bias, y, y_stride, add);
    case F16: return tiles<F16, SYMMETRIC>(w, x, x_stride, r0, r1, p0, p1, bias, y, y_stride, add);
    case W8: return tiles<W8, SYMMETRIC>(w, x, x_stride, r0, r1, p0, p1, bias, y, y_stride, add);
    case NF4: return tiles<NF4, SYMMETRIC>(w, x, x_stride, r0, r1, p0, p1, bias, y, y_stride, add);
    case E4M3: return tiles<E4M3, SYMMETRIC>(w, x, x_stride, r0, r1, p0, p1, bias, y, y_stride, add);
    case E5M2: return tiles<E5M2, SYMMETRIC>(w, x, x_stride, r0, r1, p0, p1, bias, y, y_stride, add);
    case Q4:
      if (w.offset == SYMMETRIC) return tiles<Q4, SYMMETRIC>(w, x, x_stride, r0, r1, p0, p1, bias, y, y_stride, add);
      if (w.offset == MINS) return tiles<Q4, MINS>(w, x, x_stride, r0, r1, p0, p1, bias, y, y_stride, add);
      return tiles<Q4, ZEROS>(w, x, x_stride, r0, r1, p0, p1, bias, y, y_stride, add);
  }
}

}}  // namespace LILLIPUT_ISA

extern const FloatKernels LILLIPUT_TABLE(linear_float) = {LILLIPUT_ISA::tile};

}  // namespace lilliput
