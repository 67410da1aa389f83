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

void scores(const float* a, long a_row, const float* bt, int rows, int keys, int dim, float* c) {
  for (int j = 0; j < keys; j += NV * W) {
    int r = 0;
    for (; r + MR <= rows; r += MR) score<MR, NV>(a + r * a_row, a_row, bt + j, dim, c + r * T + j);
    for (; r < rows; r++) score<1, NV>(a + r * a_row, a_row, bt + j, dim, c + r * T + j);
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

void add_product(const float* a, long a_row, long a_step, const float* b, long b_row, int rows, int count, int dim, float* c, long c_row) {
  int r = 0;
  for (; r + MR <= rows; r += MR) add_rows<MR>(a + r * a_row, a_row, a_step, b, b_row, count, dim, c + r * c_row, c_row);
  for (; r < rows; r++) add_rows<1>(a + r * a_row, a_row, a_step, b, b_row, count, dim, c + r * c_row, c_row);
}

// Keys [from, to) of the tile that a row sees, and below `sinks`; whole: all of them.
struct Seen { int from, to, sinks; bool whole; };
LP_INLINE Seen seen_by(const FlashTile& t, int row) {
  const int at = t.first_query + row - t.first_key;  // the row's own key in the tile
  int to = t.keys, from = 0;
  if (t.mask.causal && at + 1 < to) to = at + 1 < 0 ? 0 : at + 1;
  if (t.mask.window && at - t.mask.window + 1 > 0) from = at - t.mask.window + 1;
  const int sinks = t.mask.sinks - t.first_key;
  return {from, to, sinks < 0 ? 0 : sinks, from == 0 && to == T};
}

// Scores of a row become scale * s + slope * (key - query); what it may not see -inf.
LP_INLINE void masked(const FlashTile& t, int row, float* s) {
  const Seen seen = seen_by(t, row);
  for (int j = 0; j < T; j += W) store(s + j, load(s + j) * set1(t.mask.scale));
  if (t.slope != 0) for (int j = 0; j < T; j++) s[j] += t.slope * float(t.first_key + j - t.first_query - row);
  if (seen.whole) return;
  for (int j = 0; j < T; j++)
    if (j >= seen.to || (j < seen.from && j >= seen.sinks)) s[j] = NONE;
}

void forward(const FlashTile& t, float* s, float* m, float* l, float* o) {
  scores(t.q, t.q_row, t.kt, t.rows, T, t.dim, s);
  const int dim = t.value_dim;
  for (int r = 0; r < t.rows; r++) {
    float* row = s + r * T;
    masked(t, r, row);
    vf most = load(row);
    for (int j = W; j < T; j += W) most = max(most, load(row + j));
    const float top = hmax(most), now = m[r] > top ? m[r] : top;
    if (now == NONE) { memset(row, 0, T * 4); continue; }
    vf total = zero();
    for (int j = 0; j < T; j += W) { const vf p = exp(load(row + j) - set1(now)); total = total + p; store(row + j, p); }
    if (now > m[r]) {
      float shrink[W];
      store(shrink, exp(set1(m[r] - now)));
      l[r] *= shrink[0];
      if (m[r] != NONE) {
        int c = 0;
        for (; c + W <= dim; c += W) store(o + long(r) * dim + c, load(o + long(r) * dim + c) * set1(shrink[0]));
        for (; c < dim; c++) o[long(r) * dim + c] *= shrink[0];
      }
      m[r] = now;
    }
    l[r] += sum(total);
  }
  add_product(s, T, 1, t.v, t.v_row, t.rows, t.keys, dim, o, dim);
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

void backward(const FlashTile& t, const float* d_o, long do_row, const float* logsum, const float* delta, float* p, float* ds, float* dq,
    long dq_row, float* dk,
              long dk_row, float* dv, long dv_row) {
  scores(t.q, t.q_row, t.kt, t.rows, T, t.dim, p);
  scores(d_o, do_row, t.vt, t.rows, T, t.value_dim, ds);
  for (int r = 0; r < t.rows; r++) {
    float* row = p + r * T;
    masked(t, r, row);
    const float top = logsum[r];
    for (int j = 0; j < T; j += W) {
      const vf w = top == NONE ? zero() : exp(load(row + j) - set1(top));
      store(row + j, w);
      store(ds + r * T + j, w * (load(ds + r * T + j) - set1(delta[r])) * set1(t.mask.scale));
    }
  }
  if (dv) {
    add_product(p, 1, T, d_o, do_row, t.keys, t.rows, t.value_dim, dv, dv_row);
    add_product(ds, 1, T, t.q, t.q_row, t.keys, t.rows, t.dim, dk, dk_row);
  }
  if (dq) add_product(ds, T, 1, t.k, t.k_row, t.rows, t.keys, t.dim, dq, dq_row);
}

}}  // namespace LILLIPUT_ISA

extern const FlashKernels LILLIPUT_TABLE(flash) = {LILLIPUT_ISA::transpose, LILLIPUT_ISA::forward, LILLIPUT_ISA::finish, LILLIPUT_ISA::rowsum,
                                                   LILLIPUT_ISA::backward};

}  // namespace lilliput
