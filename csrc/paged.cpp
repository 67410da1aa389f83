#include "paged.h"

#include <algorithm>
#include <vector>

#include "pool.h"

namespace lilliput {
namespace {

constexpr int QUERIES = 16;  // query positions of one task; times the heads of a group, its rows

struct Part { int sequence, first_query, queries, kv_head; };

std::vector<Part> parts_of(const PagedBatch& b, int kv_heads) {
  std::vector<Part> parts;
  for (int s = 0; s < b.sequences; s++)
    for (int q = b.cu_q[s]; q < b.cu_q[s + 1]; q += QUERIES)
      for (int h = 0; h < kv_heads; h++) parts.push_back({s, q, std::min(QUERIES, b.cu_q[s + 1] - q), h});
  return parts;
}

// The rows of a part: query by query, heads of the group inside, so that limits rise.
struct Rows {
  std::vector<float> q, m, l, o, m2, l2, o2, scratch;
  std::vector<int32_t> limit;
};

PagedTask prepare(Rows& r, const Part& part, const KvCache& c, const PagedBatch& b, const PagedOptions& o, int heads, const float* q, long q_stride) {
  const int group = heads / c.kv_heads, rows = part.queries * group, d = c.head_dim;
  const auto n = size_t(rows), wide = n * size_t(d);
  r.q.resize(wide); r.o.resize(wide); r.o2.resize(wide);
  r.m.resize(n); r.l.resize(n); r.m2.resize(n); r.l2.resize(n); r.limit.resize(n);
  r.scratch.resize(n * KEY_TILE + size_t(KEY_TILE * d));
  const int behind = b.lengths[part.sequence] - b.cu_q[part.sequence + 1];  // + row of the batch = its position
  for (int i = 0; i < part.queries; i++)
    for (int g = 0; g < group; g++) {
      const int row = i * group + g;
      paged().scale(q + (part.first_query + i) * q_stride + long(part.kv_head * group + g) * d, o.scale, r.q.data() + long(row) * d, d);
      r.limit[size_t(row)] = part.first_query + i + behind + 1;
    }
  return {&c, &o, b.tables + long(part.sequence) * b.table_stride, part.kv_head, rows, -1, r.q.data(), r.limit.data(), r.m.data(), r.l.data(),
      r.o.data(), r.scratch.data()};
}

// All segments of a part, merged into r.m, r.l and r.o.
void whole(Rows& r, PagedTask t) {
  const int last = t.limit[t.rows - 1];
  paged().segment(t, 0, std::min(last, SEGMENT));
  t.m = r.m2.data(); t.l = r.l2.data(); t.o = r.o2.data();
  for (int segment = SEGMENT; segment < last; segment += SEGMENT) {
    paged().segment(t, segment, std::min(last, segment + SEGMENT));
    paged().merge(r.m.data(), r.l.data(), r.o.data(), t.m, t.l, t.o, t.rows, t.cache->head_dim);
  }
}

}  // namespace

void paged_write_row(const KvCache& cache, const PagedBatch& batch, int row, const float* k, const float* v) {
  const int s = int(std::upper_bound(batch.cu_q, batch.cu_q + batch.sequences + 1, row) - batch.cu_q) - 1;
  const int position = batch.lengths[s] - batch.cu_q[s + 1] + row;
  const int32_t* table = batch.tables + long(s) * batch.table_stride;
  for (int h = 0; h < cache.kv_heads; h++) paged().write(cache, table, position, h, k + long(h) * cache.head_dim, v + long(h) * cache.head_dim);
}

void paged_write(const KvCache& cache, const PagedBatch& batch, const float* k, const float* v, long stride) {
  const int rows = batch.cu_q[batch.sequences], chunk = cache.codec == KV_I4 ? rows : 4;
  parallel(rows ? (rows + chunk - 1) / chunk : 0, [&](int task, int) {
    for (int row = task * chunk; row < std::min(rows, task * chunk + chunk); row++) paged_write_row(cache, batch, row, k + row * stride, v + row * stride);
  });
}

void paged_attention(const KvCache& c, const PagedBatch& b, const PagedOptions& o, int heads, const float* q, long q_stride, float* out, long o_stride) {
  const std::vector<Part> parts = parts_of(b, c.kv_heads);
  const int group = heads / c.kv_heads, d = c.head_dim;
  std::vector<Rows> scratch(static_cast<size_t>(threads()));
  const auto answer = [&](const Part& part, const float* l, const float* from) {
    for (int i = 0; i < part.queries; i++)
      for (int g = 0; g < group; g++)
        paged().finish(l + i * group + g, from + long(i * group + g) * d, out + (part.first_query + i) * o_stride + long(part.kv_head * group + g) * d, d);
  };
  const auto segments = [&](const Part& part) {
    const int behind = b.lengths[part.sequence] - b.cu_q[part.sequence + 1];
    return (part.first_query + part.queries + behind + SEGMENT - 1) / SEGMENT;
  };
  // Few parts and long caches (decoding one sequence): segments are tasks of their own, merged afterwards in rising order.
  int most = 0;
  for (const Part& part : parts) most = std::max(most, segments(part));
  if (most > 1 && int(parts.size()) < 4 * threads()) {
    std::vector<Rows> each(parts.size() * size_t(most));
    parallel(int(each.size()), [&](int task, int) {
      const Part& part = parts[size_t(task / most)];
      const int segment = task % most;
      if (segment >= segments(part)) return;
      const PagedTask t = prepare(each[size_t(task)], part, c, b, o, heads, q, q_stride);
      paged().segment(t, segment * SEGMENT, std::min(t.limit[t.rows - 1], (segment + 1) * SEGMENT));
    });
    for (size_t i = 0; i < parts.size(); i++) {
      Rows& first = each[i * size_t(most)];
      for (int segment = 1; segment < segments(parts[i]); segment++) {
        Rows& next = each[i * size_t(most) + size_t(segment)];
        paged().merge(first.m.data(), first.l.data(), first.o.data(), next.m.data(), next.l.data(), next.o.data(), parts[i].queries * group, d);
      }
      answer(parts[i], first.l.data(), first.o.data());
    }
  } else {
    const int together = int(parts.size()) >= 4 * c.kv_heads * threads() ? c.kv_heads : 1;  // heads of a sequence: each asks for the next one's keys
    parallel(int(parts.size()) / together, [&](int task, int worker) {
      for (int i = task * together; i < (task + 1) * together; i++) {
        Rows& r = scratch[size_t(worker)];
        PagedTask t = prepare(r, parts[size_t(i)], c, b, o, heads, q, q_stride);
        t.next_head = i + 1 < (task + 1) * together ? t.kv_head + 1 : -1;
        whole(r, t);
        answer(parts[size_t(i)], r.l.data(), r.o.data());
      }
    });
  }
  if (!o.mass) return;
  parallel(b.sequences * c.kv_heads, [&](int task, int worker) {  // one task a sequence and head, its queries in order: sums have one order
    Rows& r = scratch[size_t(worker)];
    for (const Part& part : parts) {
      if (part.sequence != task / c.kv_heads || part.kv_head != task % c.kv_heads) continue;
      const PagedTask t = prepare(r, part, c, b, o, heads, q, q_stride);
      whole(r, t);
      paged().mass(t, 0, t.limit[t.rows - 1], o.mass + (long(part.sequence) * c.kv_heads + part.kv_head) * o.mass_stride);
    }
  });
}

}  // namespace lilliput
