#include "sparse.h"

#include "vec.h"

namespace lilliput {
namespace LILLIPUT_ISA { namespace {

template <bool HALF>
LP_INLINE vf numbers(const void* row, int k) {
  return HALF ? load_half(static_cast<const uint16_t*>(row) + k) : load(static_cast<const float*>(row) + k);
}
template <bool HALF>
LP_INLINE float number(const void* row, int k) {
  return HALF ? half_to_float(static_cast<const uint16_t*>(row)[k]) : static_cast<const float*>(row)[k];
}
template <bool HALF>
LP_INLINE const void* row_of(const RowMatrix& w, int id) { return static_cast<const char*>(w.data) + long(id) * w.width * (HALF ? 2 : 4); }

// Four chains, since one would wait for itself; the same for every number of rows.
template <bool HALF>
LP_INLINE float dot(const void* row, const float* x, int width) {
  vf acc[4] = {zero(), zero(), zero(), zero()};
  int k = 0;
  for (; k + 4 * W <= width; k += 4 * W)
    for (int c = 0; c < 4; c++) acc[c] = fma(numbers<HALF>(row, k + c * W), load(x + k + c * W), acc[c]);
  for (; k + W <= width; k += W) acc[0] = fma(numbers<HALF>(row, k), load(x + k), acc[0]);
  float s = sum((acc[0] + acc[1]) + (acc[2] + acc[3]));
  for (; k < width; k++) s += number<HALF>(row, k) * x[k];
  return s;
}

template <bool HALF>
void dots_of(const RowMatrix& w, const int32_t* ids, int from, int to, const float* x, long x_stride, int rows, float* y, long y_stride) {
  const auto chosen = [&](int i) { return row_of<HALF>(w, ids ? ids[i] : i); };
  for (int i = from; i < to; i++) {
    const void* row = chosen(i);
    if (i + 2 < to)  // the next but one: rows lie anywhere, so the hardware cannot guess
      for (int b = 0; b < w.width * (HALF ? 2 : 4); b += 64) __builtin_prefetch(static_cast<const char*>(chosen(i + 2)) + b);
    for (int r = 0; r < rows; r++) y[r * y_stride + i] = dot<HALF>(row, x + r * x_stride, w.width);
  }
}

void dots(const RowMatrix& w, const int32_t* ids, int from, int to, const float* x, long x_stride, int rows, float* y, long y_stride) {
  if (w.half) dots_of<true>(w, ids, from, to, x, x_stride, rows, y, y_stride);
  else dots_of<false>(w, ids, from, to, x, x_stride, rows, y, y_stride);
}

template <bool HALF>
void add_of(const RowMatrix& w, const int32_t* ids, int count, const float* a, int rows, int from, int to, float* y) {
  constexpr int V = 4;  // vectors of sums in registers while all ids pass
  for (int r = 0; r < rows; r++) {
    const float* weight = a + long(r) * count;
    float* sums = y + long(r) * w.width;
    int k = from;
    for (; k + V * W <= to; k += V * W) {
      vf acc[V];
      for (int v = 0; v < V; v++) acc[v] = load(sums + k + v * W);
      for (int i = 0; i < count; i++) {
        const void* row = row_of<HALF>(w, ids[i]);
        const vf s = set1(weight[i]);
        for (int v = 0; v < V; v++) acc[v] = fma(s, numbers<HALF>(row, k + v * W), acc[v]);
      }
      for (int v = 0; v < V; v++) store(sums + k + v * W, acc[v]);
    }
    for (; k < to; k += W) {
      const int n = to - k < W ? to - k : W;
      float part[W];
      vf acc = load_n(sums + k, n);
      for (int i = 0; i < count; i++) {
        const void* row = row_of<HALF>(w, ids[i]);
        for (int c = 0; c < W; c++) part[c] = c < n ? number<HALF>(row, k + c) : 0.0f;
        acc = fma(set1(weight[i]), load(part), acc);
      }
      store_n(sums + k, acc, n);
    }
  }
}

void add(const RowMatrix& w, const int32_t* ids, int count, const float* a, int rows, int from, int to, float* y) {
  if (w.half) add_of<true>(w, ids, count, a, rows, from, to, y);
  else add_of<false>(w, ids, count, a, rows, from, to, y);
}

constexpr int V = 16 / W;  // vectors of a panel
#if defined(__AVX512F__)
constexpr int ROWS = 8;
#elif defined(__AVX2__)
constexpr int ROWS = 4;
#else
constexpr int ROWS = 2;
#endif

template <int MR>
LP_INLINE void panel(const TileMatrix& w, const float* x, int p, const float* bias, float* y) {
  vf acc[MR][V];
  for (int i = 0; i < MR; i++) for (int v = 0; v < V; v++) acc[i][v] = zero();
  for (int t = w.starts[p]; t < w.starts[p + 1]; t++) {
    const float* tile = w.data + long(t) * 256;
    const float* from = x + w.blocks[t] * 16;
    for (int k = 0; k < 16; k++) {
      vf b[V];
      for (int v = 0; v < V; v++) b[v] = load(tile + k * 16 + v * W);
      for (int i = 0; i < MR; i++) {
        const vf a = set1(from[long(i) * w.inputs + k]);
        for (int v = 0; v < V; v++) acc[i][v] = fma(a, b[v], acc[i][v]);
      }
    }
  }
  for (int v = 0; v < V; v++) {
    const int column = p * 16 + v * W, n = w.outputs - column < W ? w.outputs - column : W;
    if (n <= 0) continue;
    const vf b = bias ? load_n(bias + column, n) : zero();
    for (int i = 0; i < MR; i++) store_n(y + long(i) * w.outputs + column, acc[i][v] + b, n);
  }
}

void tiles(const TileMatrix& w, const float* x, int row0, int row1, int from, int to, const float* bias, float* y) {
  for (int p = from; p < to; p++) {
    int r = row0;
    for (; r + ROWS <= row1; r += ROWS) panel<ROWS>(w, x + long(r) * w.inputs, p, bias, y + long(r) * w.outputs);
    for (; r < row1; r++) panel<1>(w, x + long(r) * w.inputs, p, bias, y + long(r) * w.outputs);
  }
}

}}  // namespace LILLIPUT_ISA

extern const SparseKernels LILLIPUT_TABLE(sparse) = {LILLIPUT_ISA::dots, LILLIPUT_ISA::add, LILLIPUT_ISA::tiles};

}  // namespace lilliput
