#include "flash.h"

#include "vec.h"

namespace lilliput {
namespace LILLIPUT_ISA { namespace {

constexpr int T = FLASH_TILE;
#if defined(__AVX512F__)
constexpr int MR = 4, NV = 4;
#else
constexpr int MR = 4, NV = 2;
#endif
const float NONE = -__builtin_inff();

void transpose(const float* x, long row, int count, int dim, float* to) {
  for (int j = 0; j < count; j++)
    for (int c = 0; c < dim; c++) to[c * T + j] = x[j * row + c];
  if (count < T) for (int c = 0; c < dim; c++) memset(to + c * T + count, 0, size_t(T - count) * 4);
}

// c[R][T] = a [R][dim] times bt [dim][T].
template <int R, int N>
LP_INLINE void score(const float* a, long a_row, const float* bt, int dim, float* c) {
  vf acc[R][N];
  for (int i = 0; i < R; i++) for (int n = 0; n < N; n++) acc[i][n] = zero();
  for (int k = 0; k < dim; k++) {
    vf b[N];
    for (int n = 0; n < N; n++) b[n] = load(bt + k * T + n * W);
    for (int i = 0; i < R; i++) {
      const vf x = set1(a[i * a_row + k]);
      for (int n = 0; n < N; n++) acc[i][n] = fma(x, b[n], acc[i][n]);
    }
  }
  for (int i = 0; i < R; i++) for (int n = 0; n < N; n++) store(c + i * T + n * W, acc[i][n]);
}

// Keys from the tile's first that the rows up to `row` see by causality; the rest of their scores is neither computed nor read.
LP_INLINE int reach(const FlashTile& t, int row) {
  const int own = t.first_query + row - t.first_key + 1;
  return !t.mask.causal || own > t.keys ? t.keys : own < 0 ? 0 : own;
}

void scores(const FlashTile& t, const float* a, long a_row, const float* bt, int dim, float* c) {
  for (int r = 0; r < t.rows;) {
    const int many = r + MR <= t.rows ? MR : 1, keys = reach(t, r + many - 1);
    int j = 0;
    for (; j < keys && (keys - j > NV * W / 2 || NV < 4); j += NV * W) {
      if (many == MR) score<MR, NV>(a + r * a_row, a_row, bt + j, dim, c + r * T + j);
      else score<1, NV>(a + r * a_row, a_row, bt + j, dim, c + r * T + j);
    }
    if (j < keys) {
      if (many == MR) score<MR, NV / 2>(a + r * a_row, a_row, bt + j, dim, c + r * T + j);
      else score<1, NV / 2>(a + r * a_row, a_row, bt + j, dim, c + r * T + j);
    }
    r += many;
  }
}

// c[R][..] += a times b [count][..]; number (i, t) of a lies at a[i * a_row + t * a_step].
template <int R, int N>
LP_INLINE void add_block(const float* a, long a_row, long a_step, const float* b, long b_row, int count, float* c, long c_row) {
  vf acc[R][N];
  for (int i = 0; i < R; i++) for (int n = 0; n < N; n++) acc[i][n] = load(c + i * c_row + n * W);
  for (int t = 0; t < count; t++) {
    vf x[N];
    for (int n = 0; n < N; n++) x[n] = load(b + t * b_row + n * W);
    for (int i = 0; i < R; i++) {
      const vf w = set1(a[i * a_row + t * a_step]);
      for (int n = 0; n < N; n++) acc[i][n] = fma(w, x[n], acc[i][n]);
    }
  }
  for (int i = 0; i < R; i++) for (int n = 0; n < N; n++) store(c + i * c_row + n * W, acc[i][n]);
}

template <int R>
LP_INLINE void add_rows(const float* a, long a_row, long a_step, const float* b, long b_row, int count, int dim, float* c, long c_row) {
  int d = 0;
  for (; d + NV * W <= dim; d += NV * W) add_block<R, NV>(a, a_row, a_step, b + d, b_row, count, c + d, c_row);
  for (; d + W <= dim; d += W) add_block<R, 1>(a, a_row, a_step, b + d, b_row, count, c + d, c_row);
  const int rest = dim - d;
  if (rest == 0) return;
  for (int i = 0; i < R; i++) {
    vf acc = load_n(c + i * c_row + d, rest);
    for (int t = 0; t < count; t++) acc = fma(set1(a[i * a_row + t * a_step]), load_n(b + t * b_row + d, rest), acc);
    store_n(c + i * c_row + d, acc, rest);
  }
}

// O, dQ: c [rows][dim] += a [rows][keys] b [keys][dim], each row over the keys that it reaches.
void add_keys(const FlashTile& t, const float* a, const float* b, long b_row, int dim, float* c, long c_row) {
  int r = 0;
  for (; r + MR <= t.rows; r += MR) add_rows<MR>(a + r * T, T, 1, b, b_row, reach(t, r + MR - 1), dim, c + r * c_row, c_row);
  for (; r < t.rows; r++) add_rows<1>(a + r * T, T, 1, b, b_row, reach(t, r), dim, c + r * c_row, c_row);
}

// dK, dV: c [keys][dim] += a^T b [rows][dim], each key over the rows that reach it.
void add_queries(const FlashTile& t, const float* a, const float* b, long b_row, int dim, float* c, long c_row) {
  for (int k = 0; k < t.keys;) {
    int from = t.mask.causal ? t.first_key + k - t.first_query : 0;
    from = from < 0 ? 0 : from > t.rows ? t.rows : from;
    const float* first = a + from * T + k;
    if (k + MR <= t.keys) { add_rows<MR>(first, 1, T, b + from * b_row, b_row, t.rows - from, dim, c + k * c_row, c_row); k += MR; }
    else { add_rows<1>(first, 1, T, b + from * b_row, b_row, t.rows - from, dim, c + k * c_row, c_row); k++; }
  }
}

// Scores of a row that are computed: what it reaches, up to a whole vector. The rest weigh 0.
LP_INLINE int width(const FlashTile& t, int row) { return (reach(t, row) + W - 1) / W * W; }

// They become scale * s + slope * (key - query); what the row may not see -inf.
LP_INLINE void masked(const FlashTile& t, int row, int end, float* s) {
  const int at = t.first_query + row - t.first_key;  // the row's own key in the tile
  for (int j = 0; j < end; j += W) store(s + j, load(s + j) * set1(t.mask.scale));
  if (t.slope != 0) for (int j = 0; j < end; j++) s[j] += t.slope * float(j - at);
  for (int j = reach(t, row); j < end; j++) s[j] = NONE;
  if (t.mask.window == 0) return;
  const int sinks = t.mask.sinks - t.first_key, from = at - t.mask.window + 1;
  for (int j = sinks < 0 ? 0 : sinks; j < from && j < end; j++) s[j] = NONE;
}

LP_INLINE float masked_max(const FlashTile& t, int row, int end, float* s) {
  masked(t, row, end, s);
  vf most = set1(NONE);
  for (int j = 0; j < end; j += W) most = max(most, load(s + j));
  return hmax(most);
}

// s becomes e^(s - top), zeros from `end` on; answers the sum.
LP_INLINE float exponents(int end, float top, float* s) {
  vf total = zero();
  for (int j = 0; j < end; j += W) { const vf p = exp(load(s + j) - set1(top)); total = total + p; store(s + j, p); }
  for (int j = end; j < T; j += W) store(s + j, zero());
  return sum(total);
}

LP_INLINE void shrink(float by, int count, float* o) {
  int c = 0;
  for (; c + W <= count; c += W) store(o + c, load(o + c) * set1(by));
  for (; c < count; c++) o[c] *= by;
}

void forward(const FlashTile& t, float* s, float* m, float* l, float* o) {
  scores(t, t.q, t.q_row, t.kt, t.dim, s);
  const int dim = t.value_dim;
  for (int r = 0; r < t.rows; r++) {
    float* row = s + r * T;
    const int end = width(t, r);  // whole rows apart: a constant count unrolls
    const float top = end == T ? masked_max(t, r, T, row) : masked_max(t, r, end, row), now = m[r] > top ? m[r] : top;
    if (now == NONE) { memset(row, 0, T * 4); continue; }
    const float total = end == T ? exponents(T, now, row) : exponents(end, now, row);
    if (now > m[r]) {
      float by[W];
      store(by, exp(set1(m[r] - now)));
      l[r] *= by[0];
      if (m[r] != NONE) shrink(by[0], dim, o + long(r) * dim);
      m[r] = now;
    }
    l[r] += total;
  }
  add_keys(t, s, t.v, t.v_row, dim, o, dim);
}

void all_scores(const FlashTile& t, float* s) { scores(t, t.q, t.q_row, t.kt, t.dim, s); }

void strip(const FlashTile* tiles, int count, float* s, long step, float* m, float* l, float* o) {
  const int rows = tiles[0].rows;
  for (int r = 0; r < rows; r++) {
    for (int i = 0; i < count; i++) {
      const float top = masked_max(tiles[i], r, width(tiles[i], r), s + i * step + r * T);
      m[r] = m[r] > top ? m[r] : top;  // NaN goes on
    }
    for (int i = 0; i < count; i++) {
      float* row = s + i * step + r * T;
      if (m[r] == NONE) memset(row, 0, T * 4);
      else l[r] += exponents(width(tiles[i], r), m[r], row);
    }
  }
  for (int i = 0; i < count; i++) add_keys(tiles[i], s + i * step, tiles[i].v, tiles[i].v_row, tiles[i].value_dim, o, tiles[i].value_dim);
}

void finish(const float* m, const float* l, const float* o, int rows, int dim, float* to, long to_row, float* logsum) {
  for (int r = 0; r < rows; r++) {
    const float inverse = l[r] == 0 ? 0.0f : 1.0f / l[r];
    int c = 0;
    for (; c + W <= dim; c += W) store(to + r * to_row + c, load(o + long(r) * dim + c) * set1(inverse));
    for (; c < dim; c++) to[r * to_row + c] = o[long(r) * dim + c] * inverse;
    logsum[r] = l[r] == 0 ? NONE : m[r] + __builtin_logf(l[r]);  // NaN stays NaN
  }
}

void rowsum(const float* o, long o_row, const float* d_o, long do_row, int rows, int dim, float* delta) {
  for (int r = 0; r < rows; r++) {
    vf total = zero();
    int c = 0;
    for (; c + W <= dim; c += W) total = fma(load(o + r * o_row + c), load(d_o + r * do_row + c), total);
    if (c < dim) total = fma(load_n(o + r * o_row + c, dim - c), load_n(d_o + r * do_row + c, dim - c), total);
    delta[r] = sum(total);
  }
}

// p: scores become weights; ds: dO V^T becomes scale * dS. Zeros from `end` on.
LP_INLINE void slopes(const FlashTile& t, int row, int end, float top, float delta, float* p, float* ds) {
  masked(t, row, end, p);
  for (int j = 0; j < end; j += W) {
    const vf w = exp(load(p + j) - set1(top));
    store(p + j, w);
    store(ds + j, w * (load(ds + j) - set1(delta)) * set1(t.mask.scale));
  }
  for (int j = end; j < T; j += W) { store(p + j, zero()); store(ds + j, zero()); }
}

void backward(const FlashTile& t, const float* d_o, long do_row, const float* logsum, const float* delta, float* p, float* ds, float* dq,
    long dq_row, float* dk,
              long dk_row, float* dv, long dv_row) {
  scores(t, t.q, t.q_row, t.kt, t.dim, p);
  scores(t, d_o, do_row, t.vt, t.value_dim, ds);
  for (int r = 0; r < t.rows; r++) {
    const int end = logsum[r] == NONE ? 0 : width(t, r);
    if (end == T) slopes(t, r, T, logsum[r], delta[r], p + r * T, ds + r * T);
    else slopes(t, r, end, logsum[r], delta[r], p + r * T, ds + r * T);
  }
  if (dv) {
    add_queries(t, p, d_o, do_row, t.value_dim, dv, dv_row);
    add_queries(t, ds, t.q, t.q_row, t.dim, dk, dk_row);
  }
  if (dq) add_keys(t, ds, t.k, t.k_row, t.dim, dq, dq_row);
}

}}  // namespace LILLIPUT_ISA

extern const FlashKernels LILLIPUT_TABLE(flash) = {LILLIPUT_ISA::transpose, LILLIPUT_ISA::forward, LILLIPUT_ISA::all_scores, LILLIPUT_ISA::strip,
                                                   LILLIPUT_ISA::finish, LILLIPUT_ISA::rowsum, LILLIPUT_ISA::backward};

}  // namespace lilliput
