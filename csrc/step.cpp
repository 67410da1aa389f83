#include "step.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>

#include "pool.h"

namespace lilliput {
namespace {

struct Step {
  Plan& plan;
  const Batch& batch;
  float* x;  // the residual stream
  Reduce reduce;
  void* context;
};

constexpr long SMALL = 1 << 13;  // elements below which waking the pool costs more than the work

// f(row) for all rows: alone when there is little to do.
template <class F>
void each_row(int rows, long width, F&& f) {
  if (rows * width < SMALL) { for (int r = 0; r < rows; r++) f(r); return; }
  const int chunk = int(std::max(1L, SMALL / 4 / width));
  parallel((rows + chunk - 1) / chunk, [&](int task, int) {
    for (int r = task * chunk; r < std::min(rows, (task + 1) * chunk); r++) f(r);
  });
}

float* room(std::vector<float>& v, long count) {
  if (long(v.size()) < count) v.resize(size_t(count));
  return v.data();
}

const float* normed(Step& s, const Norm& norm) {
  if (norm.kind == NO_NORM) return s.x;
  float* y = room(s.plan.scratch.normed, long(s.batch.rows) * s.plan.dim);
  const int dim = s.plan.dim;
  each_row(s.batch.rows, dim, [&](int r) { step().norm(norm, s.x + long(r) * dim, y + long(r) * dim, 1, dim); });
  return y;
}

long qkv_width(const Plan& p) { return long(p.heads + 2 * p.kv_heads) * p.head_dim; }

void qkv(Step& s, const Layer& layer) {
  Plan& p = s.plan;
  const bool pre = layer.regions.back() != NORM_2;
  const float* x = pre ? normed(s, layer.input_norm) : s.x;
  float* y = room(p.scratch.qkv, s.batch.rows * qkv_width(p));
  p.product(layer.qkv, x, p.dim, s.batch.rows, y, qkv_width(p), false);
  p.update(s.batch, layer, QKV_SLOT, x, p.dim, y, qkv_width(p));
}

void rotate(Step& s, const Layer& layer) {
  Plan& p = s.plan;
  const long width = qkv_width(p), q = long(p.heads) * p.head_dim, kv = long(p.kv_heads) * p.head_dim;
  float* rows = p.scratch.qkv.data();
  const int half = p.head_dim / 2;
  const bool apart = layer.cache.codec == KV_I4;  // neighbours share bytes there
  each_row(s.batch.rows, width, [&](int r) {
    float* row = rows + r * width;
    if (layer.q_norm) {
      step().head_norm(layer.q_norm, layer.qk_eps, row, p.heads, p.head_dim);
      step().head_norm(layer.k_norm, layer.qk_eps, row + q, p.kv_heads, p.head_dim);
    }
    if (p.cos) {
      const long angle = long(s.batch.positions[r]) * half;
      step().rotate(p.cos + angle, p.sin + angle, row, p.key_cos ? p.heads : p.heads + p.kv_heads, p.head_dim);
    }
    if (!apart) paged_write_row(layer.cache, s.batch.paged, r, row + q, row + q + kv);
  });
  if (apart) paged_write(layer.cache, s.batch.paged, rows + q, rows + q + kv, width);
}

void attend(Step& s, const Layer& layer) {
  Plan& p = s.plan;
  PagedOptions options{};
  options.scale = p.scale;
  options.window = layer.window;
  options.sinks = layer.sinks;
  options.cos = p.key_cos;
  options.sin = p.key_sin;
  if (s.batch.mass) {
    options.mass = s.batch.mass + (&layer - p.layers.data()) * long(s.batch.paged.sequences) * p.kv_heads * s.batch.mass_stride;
    options.mass_stride = s.batch.mass_stride;
  }
  const long q = long(p.heads) * p.head_dim;
  float* o = room(p.scratch.attended, s.batch.rows * q);
  paged_attention(layer.cache, s.batch.paged, options, p.heads, p.scratch.qkv.data(), qkv_width(p), o, q);
}

void out(Step& s, const Layer& layer) {
  const long q = long(s.plan.heads) * s.plan.head_dim;
  s.plan.residual(layer.out, s.plan.scratch.attended.data(), q, s.batch.rows, s.x, s.reduce, s.context);
  s.plan.update(s.batch, layer, OUT_SLOT, s.plan.scratch.attended.data(), q, s.x, s.plan.dim);
}

void up(Step& s, const Layer& layer) {
  Plan& p = s.plan;
  const bool pre = layer.regions.back() != NORM_2;
  const float* x = pre ? normed(s, layer.mlp_norm) : s.x;
  const long width = layer.up.weight.outputs;
  float* y = room(p.scratch.up, s.batch.rows * width);
  p.product(layer.up, x, p.dim, s.batch.rows, y, width, false);
  p.update(s.batch, layer, UP_SLOT, x, p.dim, y, width);
}

void down(Step& s, const Layer& layer) {
  Plan& p = s.plan;
  const long width = layer.up.weight.outputs;
  const float* up = p.scratch.up.data();
  float* y = room(p.scratch.acted, long(s.batch.rows) * p.ffn);
  each_row(s.batch.rows, width, [&](int r) { step().act(p.act, up + r * width, y + long(r) * p.ffn, p.ffn); });
  p.residual(layer.down, y, p.ffn, s.batch.rows, s.x, s.reduce, s.context);
  p.update(s.batch, layer, DOWN_SLOT, y, p.ffn, s.x, p.dim);
}

void norm_in_place(Step& s, const Norm& norm) {
  const int dim = s.plan.dim;
  each_row(s.batch.rows, dim, [&](int r) { step().norm(norm, s.x + long(r) * dim, s.x + long(r) * dim, 1, dim); });
}
void norm_1(Step& s, const Layer& layer) { norm_in_place(s, layer.input_norm); }
void norm_2(Step& s, const Layer& layer) { norm_in_place(s, layer.mlp_norm); }

using Run = void (*)(Step&, const Layer&);
constexpr Run REGIONS[] = {qkv, rotate, attend, out, up, down, norm_1, norm_2};  // in the order of enum Region

}  // namespace

// Tensor-parallel ranks add partial sums before the residual; alone, the product adds to it directly.
void Plan::residual(const Product& p, const float* x, long x_stride, int rows, float* to, Reduce reduce, void* context) {
  if (!reduce) return product(p, x, x_stride, rows, to, dim, true);
  float* partial = room(scratch.partial, long(rows) * dim);
  product(p, x, x_stride, rows, partial, dim, false);
  reduce(context, partial, long(rows) * dim);
  each_row(rows, dim, [&](int r) { step().add(partial + long(r) * dim, to + long(r) * dim, dim); });
}

// SGMV: in two regions whatever the number of segments, x A^T of all, then B. Each row's sums are those of the row alone, as everywhere (linear.h).
void low_rank(const std::vector<Segment>& segments, const float* x, long x_stride, float* y, long y_stride, std::vector<float>& scratch) {
  constexpr int ROWS = 32, RANKS = 8, PANELS = 16;  // of one task
  struct Task { const Delta* delta; const Delta::Part* part; const float* x; float* low; float* y; int rows, from, to; };
  std::vector<Task> first, second;
  long size = 0;
  const auto each = [&](auto&& f) {
    for (const Segment& s : segments)
      if (s.delta->a.data) for (int r = s.row0; r < s.row1; r += ROWS) f(*s.delta, r, std::min(ROWS, s.row1 - r));
  };
  each([&](const Delta& delta, int, int rows) { size += long(rows) * delta.a.count; });
  if (size == 0) return;
  float* low = room(scratch, size);
  each([&](const Delta& delta, int row, int rows) {
    Task task{&delta, nullptr, x + row * x_stride, low, y + row * y_stride, rows, 0, 0};
    const auto cut = [&](std::vector<Task>& tasks, int count, int most) {
      for (task.from = 0; task.from < count; task.from = task.to) { task.to = std::min(task.from + most, count); tasks.push_back(task); }
    };
    cut(first, delta.a.count, RANKS);
    for (const Delta::Part& part : delta.parts) { task.part = &part; cut(second, part.b.panels(), PANELS); }
    low += long(rows) * delta.a.count;
  });
  const auto dots = sparse().dots;
  parallel(int(first.size()), [&](int i, int) {
    const Task& t = first[size_t(i)];
    dots(t.delta->a, nullptr, t.from, t.to, t.x, x_stride, t.rows, t.low, t.delta->a.count);
  });
  const auto tile = linear_float().tile;
  parallel(int(second.size()), [&](int i, int) {
    const Task& t = second[size_t(i)];
    tile(t.part->b, t.low + t.part->from, t.delta->a.count, 0, t.rows, t.from, t.to, nullptr, t.y + t.part->to, y_stride, true);
  });
}

void Plan::update(const Batch& batch, const Layer& layer, Slot slot, const float* x, long x_stride, float* y, long y_stride) {
  if (batch.adapted_count == 0) return;
  std::vector<Segment> segments;
  for (int i = 0; i < batch.adapted_count; i++) {
    const Adapted& part = batch.adapted[i];
    segments.push_back({part.row0, part.row1, &part.adapter->layers[size_t(&layer - layers.data())][size_t(slot)]});
  }
  low_rank(segments, x, x_stride, y, y_stride, scratch.low);
}

void Plan::product(const Product& p, const float* x, long x_stride, int rows, float* y, long y_stride, bool add) {
  if (p.float8) {
    const int k = p.weight.inputs;
    float* to = room(scratch.rounded, long(rows) * k);
    each_row(rows, k, [&](int r) { step().round8(x + r * x_stride, to + long(r) * k, k); });
    x = to;
    x_stride = k;
  }
  if (!p.int8) return linear32(p.weight, x, x_stride, rows, p.bias, y, y_stride, add);
  const size_t space = rows8_bytes(p.weight, rows);
  if (scratch.rows8.size() < space) scratch.rows8.resize(space);
  linear8(p.weight, x, x_stride, rows, p.scales, scratch.rows8.data(), p.bias, y, y_stride, add);
}

void Plan::forward(const Batch& batch, const int32_t* tokens, float* x, int first, int last, Reduce reduce, void* context) {
  if (batch.rows == 0) return;
  if (tokens) {
    float* to = project_in ? room(scratch.wide, long(batch.rows) * wide) : x;
    each_row(batch.rows, wide, [&](int r) { weight_row(embed, tokens[r], to + long(r) * wide); });
    if (project_in) product(project_in, to, wide, batch.rows, x, dim, false);
    if (learned)
      each_row(batch.rows, dim, [&](int r) { step().add(learned + long(batch.positions[r]) * dim, x + long(r) * dim, dim); });
  }
  Step s{*this, batch, x, reduce, context};
  for (int i = first; i < last; i++)
    for (const int region : layers[size_t(i)].regions) {
      if (!clock) { REGIONS[region](s, layers[size_t(i)]); continue; }
      const auto start = std::chrono::steady_clock::now();
      REGIONS[region](s, layers[size_t(i)]);
      clock[region] += std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    }
}

void Plan::logits(const float* x, const int32_t* sampled, int count, float* out) {
  if (count == 0) return;
  float* h = room(scratch.normed, long(count) * dim);
  for (int i = 0; i < count; i++) {
    const float* row = x + long(sampled[i]) * dim;
    if (norm.kind == NO_NORM) std::memcpy(h + long(i) * dim, row, sizeof(float) * size_t(dim));
    else step().norm(norm, row, h + long(i) * dim, 1, dim);
  }
  if (project_out) {
    float* projected = room(scratch.wide, long(count) * wide);
    product(project_out, h, dim, count, projected, wide, false);
    h = projected;
  }
  product(head, h, wide, count, out, vocab, false);
}

namespace {
float half(uint16_t h) {
  const int exponent = h >> 10 & 31, mantissa = h & 1023;
  const float value = exponent == 31 ? (mantissa ? NAN : INFINITY) : exponent ? std::ldexp(float(1024 + mantissa), exponent - 25)
      : std::ldexp(float(mantissa), -24);
  return h >> 15 ? -value : value;
}
}  // namespace

// Rows of an embedding are few, so this is plain code; it gives bit for bit what dequantising the whole matrix would.
void weight_row(const Weight& w, int row, float* out) {
  const int panel = row / PANEL, column = row % PANEL, k = w.inputs;
  const int padded = w.format == W8 ? (k + 3) / 4 * 4 : w.format == Q4 ? (k + 7) / 8 * 8 : k;
  const size_t first = size_t(panel) * size_t(padded) * PANEL;
  const auto group = [&](int i) { return (size_t(panel) * size_t(w.groups()) + size_t(w.group ? i / w.group : 0)) * PANEL + size_t(column); };
  for (int i = 0; i < k; i++) {
    if (w.format == F32) out[i] = static_cast<const float*>(w.data)[first + size_t(i) * PANEL + size_t(column)];
    else if (w.format == F16) out[i] = half(static_cast<const uint16_t*>(w.data)[first + size_t(i) * PANEL + size_t(column)]);
    else if (w.format == W8) {
      const int q = static_cast<const int8_t*>(w.data)[first + size_t(i / 4) * 4 * PANEL + size_t(column) * 4 + size_t(i % 4)];
      out[i] = float(q) * static_cast<const float*>(w.scales)[group(i)];
    } else {  // Q4
      const uint8_t byte = static_cast<const uint8_t*>(w.data)[first / 2 + size_t(i / 8) * 4 * PANEL + size_t(column) * 4 + size_t(i % 4)];
      const float n = float(i % 8 < 4 ? byte & 15 : byte >> 4), s = half(static_cast<const uint16_t*>(w.scales)[group(i)]);
      const float o = w.offset == SYMMETRIC ? 8.0f : half(static_cast<const uint16_t*>(w.offsets)[group(i)]);
      out[i] = w.offset == MINS ? s * n + o : s * (n - o);
    }
  }
}

}  // namespace lilliput
