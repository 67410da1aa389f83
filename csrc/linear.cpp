#include "linear.h"

#include "pool.h"

namespace lilliput {
namespace {

// Work is cut into tiles of rows x panels, rows innermost, so that a panel is read from memory once and then from the cache.
// More tiles than threads, since a thread can lose its core; the borders change nothing in the results.
struct Tiling { int rows, panels, across, count; };

Tiling tiling(int rows, int panels) {
  Tiling t;
  t.rows = rows <= 96 ? rows : 96;
  const int down = (rows + t.rows - 1) / t.rows, wanted = 4 * threads();
  t.panels = (panels * down + wanted - 1) / wanted;
  if (t.panels > 32) t.panels = 32;
  if (t.panels < 2) t.panels = 2;
  t.across = (panels + t.panels - 1) / t.panels;
  t.count = t.across * down;
  return t;
}

template <class F>
void each_tile(int rows, int panels, F&& tile) {
  if (rows <= 0) return;
  const Tiling t = tiling(rows, panels);
  const int down = (rows + t.rows - 1) / t.rows;
  parallel(t.count, [&](int task, int) {
    const int r = task % down * t.rows, p = task / down * t.panels;
    tile(r, r + t.rows < rows ? r + t.rows : rows, p, p + t.panels < panels ? p + t.panels : panels);
  });
}

}  // namespace

void linear8(const Weight& w, const Rows8& x, int rows, const float* bias, float* y, long y_stride, bool add) {
  const auto tile = linear_int().tile;
  each_tile(rows, w.panels(), [&](int r0, int r1, int p0, int p1) { tile(w, x, r0, r1, p0, p1, bias, y, y_stride, add); });
}

void linear32(const Weight& w, const float* x, long x_stride, int rows, const float* bias, float* y, long y_stride, bool add) {
  const auto tile = linear_float().tile;
  each_tile(rows, w.panels(), [&](int r0, int r1, int p0, int p1) { tile(w, x, x_stride, r0, r1, p0, p1, bias, y, y_stride, add); });
}

}  // namespace lilliput
