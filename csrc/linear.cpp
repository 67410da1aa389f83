#include "linear.h"

#include <algorithm>

#include "pool.h"

namespace lilliput {
namespace {

// Work is cut into tiles of rows x panels of nearly equal size, rows innermost, so that a panel is read from memory once and then from
// the cache. More tiles than threads, since a thread can lose its core; the borders change nothing in the results.
template <class F>
void each_tile(int rows, int panels, F&& tile) {
  if (rows <= 0) return;
  const int down = (rows + 95) / 96, wanted = 4 * threads(), least = (panels + 31) / 32, most = (panels + 1) / 2;  // 2 to 32 panels
  const int across = std::min(most, std::max(least, (wanted + down - 1) / down));
  parallel_home(across * down, [&](int task, int) {
    const long r = task % down, p = task / down;
    tile(int(rows * r / down), int(rows * (r + 1) / down), int(panels * p / across), int(panels * (p + 1) / across));
  });
}

constexpr int FEW = 1 << 12;  // numbers below which waking the pool costs more than quantising

}  // namespace

void quantize8(const Weight& w, const float* x, long x_stride, int rows, const float* given, const Rows8& to) {
  const auto quantize = linear_int().quantize;
  if (long(rows) * w.inputs < FEW) quantize(w, x, x_stride, 0, rows, given, to);
  else {
    const int tasks = int(std::min({long(rows), long(rows) * w.inputs / (FEW / 2), 4L * threads()}));
    parallel_home(tasks, [&](int i, int) { quantize(w, x, x_stride, int(long(rows) * i / tasks), int(long(rows) * (i + 1) / tasks), given, to); });
  }
}

size_t rows8_bytes(const Weight& w, int rows) {
  return size_t(rows) * (size_t(w.inputs + 63) / 64 * 64 + size_t(w.groups()) * 8) + 64;
}

void linear8(const Weight& w, const float* x, long x_stride, int rows, const float* given, void* space, const float* bias, float* y, long y_stride, bool add) {
  const int stride = (w.inputs + 63) / 64 * 64, groups = w.groups();
  auto* q = reinterpret_cast<int8_t*>((reinterpret_cast<uintptr_t>(space) + 63) & ~uintptr_t(63));
  auto* scales = reinterpret_cast<float*>(q + long(rows) * stride);
  const Rows8 to{q, scales, reinterpret_cast<int32_t*>(scales + long(rows) * groups), stride, groups};
  quantize8(w, x, x_stride, rows, given, to);
  const auto tile = linear_int().tile;
  each_tile(rows, w.panels(), [&](int r0, int r1, int p0, int p1) { tile(w, to, r0, r1, p0, p1, bias, y, y_stride, add); });
}

void linear32(const Weight& w, const float* x, long x_stride, int rows, const float* bias, float* y, long y_stride, bool add) {
  const auto tile = linear_float().tile;
  each_tile(rows, w.panels(), [&](int r0, int r1, int p0, int p1) { tile(w, x, x_stride, r0, r1, p0, p1, bias, y, y_stride, add); });
}

}  // namespace lilliput
