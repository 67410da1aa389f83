#include "flash.h"

#include <algorithm>
#include <cstdlib>
#include <limits>
#include <new>
#include <vector>

#include "pool.h"

namespace lilliput {
namespace {

constexpr int T = FLASH_TILE;
const float NONE = -std::numeric_limits<float>::infinity();

// Scratch that stays with its thread: a fresh allocation of this size would be mapped and faulted in page by page at every call.
struct Kept {
  float* data = nullptr;
  size_t count = 0;
  float* room(size_t wanted) {
    if (wanted > count) {
      std::free(data);
      data = static_cast<float*>(std::aligned_alloc(64, (wanted * 4 + 63) / 64 * 64));
      if (!data) { count = 0; throw std::bad_alloc(); }
      count = wanted;
    }
    return data;
  }
  ~Kept() { std::free(data); }
};
thread_local Kept kept_keys, kept_values, kept_tiles, kept_delta, kept_shares, kept_scores;

struct Problem {  // one sequence
  const float *q, *k, *v, *o, *d_o;
  float *out, *dq, *dk, *dv;
  int queries, keys;
  const float* logsum;
  float* logsum_out;
  long logsum_head;
  long panels;  // where its transposed tiles begin, in tiles
  long key_rows;  // and its keys, in rows
};

int tiles(int count) { return (count + T - 1) / T; }

struct Job {
  const FlashShape& s;
  const FlashMask& m;
  std::vector<Problem> problems;
  long panels = 0, key_rows = 0;  // key tiles and keys over all problems

  Job(const FlashShape& shape, const FlashMask& mask) : s(shape), m(mask) {
    int rows = s.cu_q ? s.cu_q[s.batch] : 0;
    for (int b = 0; b < s.batch; b++) {
      Problem p{};
      p.queries = s.cu_q ? s.cu_q[b + 1] - s.cu_q[b] : s.queries;
      p.keys = s.cu_k ? s.cu_k[b + 1] - s.cu_k[b] : s.keys;
      p.logsum_head = s.cu_q ? rows : s.queries;
      p.panels = panels;
      p.key_rows = key_rows;
      panels += tiles(p.keys);
      key_rows += p.keys;
      problems.push_back(p);
    }
  }
  long at(const long batch, const long row, int b, const int32_t* cu) const { return cu ? long(cu[b]) * row : b * batch; }
  long sums(int b) const { return s.cu_q ? s.cu_q[b] : long(b) * s.heads * s.queries; }

  // Key tiles [first, last) that a block of queries can see: the rest is skipped, sinks apart.
  void range(const Problem& p, int block, int& first, int& last) const {
    const int behind = p.keys - p.queries, low = block * T + behind, high = std::min(p.queries, (block + 1) * T) - 1 + behind;
    first = 0;
    last = tiles(p.keys);
    if (m.causal) last = std::min(last, high < 0 ? 0 : high / T + 1);
    if (m.window && low - m.window + 1 > 0) first = std::min((low - m.window + 1) / T, last);
  }
  bool visible(const Problem& p, int block, int tile) const {
    int first, last;
    range(p, block, first, last);
    return tile < last && (tile >= first || (m.window && tile * T < m.sinks));
  }

  FlashTile tile(const Problem& p, int head, int block, int key_tile, const View& q, const View& k, const View& v) const {
    FlashTile t{};
    t.rows = std::min(T, p.queries - block * T);
    t.keys = std::min(T, p.keys - key_tile * T);
    t.first_query = block * T + p.keys - p.queries;
    t.first_key = key_tile * T;
    t.dim = s.dim; t.value_dim = s.value_dim;
    t.mask = m;
    t.slope = m.slopes ? m.slopes[head] : 0;
    const int kv = head / (s.heads / s.kv_heads);
    t.q = p.q + head * q.head + long(block) * T * q.row; t.q_row = q.row;
    t.k = p.k + kv * k.head + long(key_tile) * T * k.row; t.k_row = k.row;
    t.v = p.v + kv * v.head + long(key_tile) * T * v.row; t.v_row = v.row;
    return t;
  }

  // Transposed tiles of keys (or values) for all kv heads: [kv_head][panel][dim][64].
  const float* transposed(const View& x, int dim, bool values) const {
    float* to = (values ? kept_values : kept_keys).room(static_cast<size_t>(s.kv_heads) * static_cast<size_t>(panels) * static_cast<size_t>(dim) * T);
    parallel(int(panels) * s.kv_heads, [&](int task, int) {
      const int head = task / int(panels);
      const long panel = task % panels;
      const Problem& p = *(std::upper_bound(problems.begin(), problems.end(), panel, [](long at, const Problem& one) { return at < one.panels; }) - 1);
      const long key = (panel - p.panels) * T;
      flash().transpose((values ? p.v : p.k) + head * x.head + key * x.row, x.row, std::min(T, int(p.keys - key)), dim,
                        to + (long(head) * panels + panel) * dim * T);
    });
    return to;
  }
};

struct Block { int problem, head, block; };

// Blocks of queries, the longest causal ones first, so that no thread is left with one at the end.
std::vector<Block> blocks_of(const Job& job) {
  std::vector<Block> blocks;
  for (int b = 0; b < job.s.batch; b++)
    for (int h = 0; h < job.s.heads; h++)
      for (int i = tiles(job.problems[size_t(b)].queries) - 1; i >= 0; i--) blocks.push_back({b, h, i});
  std::stable_sort(blocks.begin(), blocks.end(), [](const Block& a, const Block& b) { return a.block > b.block; });
  return blocks;
}

// One block of queries over the key tiles that it sees.
struct Forward {
  const Job& job;
  View q, k, v;
  const float* kt;
  int most;  // key tiles of the longest sequence

  template <class F>
  void each_tile(const Block& at, F&& f) const {
    const Problem& p = job.problems[size_t(at.problem)];
    int first, last;
    job.range(p, at.block, first, last);
    const int kv = at.head / (job.s.heads / job.s.kv_heads);
    const auto pass = [&](int tile) {
      FlashTile t = job.tile(p, at.head, at.block, tile, q, k, v);
      t.kt = kt + (long(kv) * job.panels + p.panels + tile) * job.s.dim * T;
      f(t);
    };
    if (job.m.window) for (int tile = 0; tile < first && tile * T < job.m.sinks; tile++) pass(tile);
    for (int tile = first; tile < last; tile++) pass(tile);
  }
  // 16 queries at a time. `scores`: of the whole block, in memory, [most][64][64] (PARTIAL); null: into `mine`, [most][16][64] (STRIP).
  void strips(const Block& at, float* scores, float* mine, float* m, float* l, float* o) const {
    std::vector<FlashTile> seen;
    seen.reserve(size_t(most));
    const int rows = std::min(T, job.problems[size_t(at.problem)].queries - at.block * T);
    for (int row = 0; row < rows; row += STRIP_ROWS) {
      seen.clear();
      each_tile(at, [&](FlashTile t) {
        t.rows = std::min(STRIP_ROWS, rows - row);
        t.first_query += row;
        t.q += row * t.q_row;
        if (job.m.causal && t.first_key >= t.first_query + t.rows) return;
        if (!scores) flash().scores(t, mine + long(seen.size()) * STRIP_ROWS * T);
        seen.push_back(t);
      });
      if (seen.empty()) continue;
      flash().strip(seen.data(), int(seen.size()), scores ? scores + row * T : mine, (scores ? T : STRIP_ROWS) * T, m + row, l + row, o + row * job.s.value_dim);
    }
  }
};

}  // namespace

FlashScratch flash_scratch() { return {long(kept_tiles.count * 4), long(kept_scores.count * 4)}; }

void flash_forward(const FlashShape& s, const FlashMask& m, View q, View k, View v, Out o, float* logsum, FlashForm form) {
  Job job(s, m);
  int most = 1;
  for (int b = 0; b < s.batch; b++) {
    Problem& p = job.problems[size_t(b)];
    p.q = q.data + job.at(q.batch, q.row, b, s.cu_q); p.k = k.data + job.at(k.batch, k.row, b, s.cu_k); p.v = v.data + job.at(v.batch, v.row, b, s.cu_k);
    p.out = o.data + job.at(o.batch, o.row, b, s.cu_q);
    p.logsum_out = logsum + job.sums(b);
    most = std::max(most, tiles(p.keys));
  }
  const Forward forward{job, q, k, v, job.transposed(k, s.dim, false), most};
  const std::vector<Block> blocks = blocks_of(job);
  float* scores = nullptr;
  if (form.partial) {
    scores = kept_scores.room(blocks.size() * static_cast<size_t>(most) * T * T);
    parallel(int(blocks.size()), [&](int task, int) {
      float* to = scores + long(task) * most * T * T;
      forward.each_tile(blocks[size_t(task)], [&](const FlashTile& t) { flash().scores(t, to); to += T * T; });
    });
  }
  const long strip = std::max(T * T, std::min(most, tiles(form.strip_keys)) * STRIP_ROWS * T), each = strip + 2 * T + T * s.value_dim;
  float* scratch = kept_tiles.room(static_cast<size_t>(threads()) * size_t(each));
  parallel(int(blocks.size()), [&](int task, int worker) {
    const Block& at = blocks[size_t(task)];
    const Problem& p = job.problems[size_t(at.problem)];
    float* mine = scratch + worker * each;
    float *run_m = mine + strip, *run_l = run_m + T, *run_o = run_l + T;
    std::fill(run_m, run_m + T, NONE);
    std::fill(run_l, run_o + T * s.value_dim, 0.0f);
    if (!form.partial && p.keys > form.strip_keys) forward.each_tile(at, [&](const FlashTile& t) { flash().forward(t, mine, run_m, run_l, run_o); });
    else forward.strips(at, scores ? scores + long(task) * most * T * T : nullptr, mine, run_m, run_l, run_o);
    flash().finish(run_m, run_l, run_o, std::min(T, p.queries - at.block * T), s.value_dim, p.out + at.head * o.head + long(at.block) * T * o.row, o.row,
                   p.logsum_out + at.head * p.logsum_head + at.block * T);
  });
}

namespace {

void fill(float* to, long row, int rows, int count) {
  for (int r = 0; r < rows; r++) std::fill(to + r * row, to + r * row + count, 0.0f);
}
void add(const float* x, long x_row, int rows, int count, float* to, long row) {
  for (int r = 0; r < rows; r++) for (int c = 0; c < count; c++) to[r * row + c] += x[r * x_row + c];
}

// dK and dV are sums over the heads of a group, each head's own sum (its share) first: the same bits whichever way the tasks are cut.
struct Backward {
  const Job& job;
  View q, k, v, d_o;
  const float *logsum, *delta;
  Out dq, dk, dv;
  const FlashShape& s = job.s;
  const int group = s.heads / s.kv_heads, share = s.dim + s.value_dim;
  const long each = 2 * T * T + 2 * T * share;  // scratch of a thread: P, dS, transposed K and V, a tile's share

  void one(const Problem& p, int head, int block, int tile, const float* kt, const float* vt, float* mine, bool want_q, float* to_k, long k_row, float* to_v,
           long v_row) const {
    FlashTile t = job.tile(p, head, block, tile, q, k, v);
    t.kt = kt; t.vt = vt;
    const long row = long(block) * T, sums = head * p.logsum_head + row;
    flash().backward(t, p.d_o + head * d_o.head + row * d_o.row, d_o.row, p.logsum + sums, delta + (p.logsum - logsum) + sums, mine, mine + T * T,
                     want_q ? p.dq + head * dq.head + row * dq.row : nullptr, dq.row, to_k, k_row, to_v, v_row);
  }
  // One head's blocks of queries against a tile: its share of dK and dV goes to to_k and to_v; with want_q, dQ grows too.
  void head_tile(const Problem& p, int head, int tile, const float* kt, const float* vt, float* mine, bool want_q, float* to_k, long k_row, float* to_v,
                 long v_row) const {
    const int count = std::min(T, p.keys - tile * T);
    fill(to_k, k_row, count, s.dim);
    fill(to_v, v_row, count, s.value_dim);
    for (int block = 0; block < tiles(p.queries); block++)
      if (job.visible(p, block, tile)) one(p, head, block, tile, kt, vt, mine, want_q, to_k, k_row, to_v, v_row);
  }
  void transpose(const Problem& p, int kv, int tile, float* kt, float* vt) const {
    const int count = std::min(T, p.keys - tile * T);
    flash().transpose(p.k + kv * k.head + long(tile) * T * k.row, k.row, count, s.dim, kt);
    flash().transpose(p.v + kv * v.head + long(tile) * T * v.row, v.row, count, s.value_dim, vt);
  }

  // Tasks are heads: dQ, dK and dV in one pass, five products a tile. The first head of a group writes to dK and dV, the others' shares wait.
  void by_heads(float* scratch) const {
    float* shares = kept_shares.room(size_t(s.kv_heads) * size_t(group - 1) * size_t(job.key_rows) * size_t(share));
    const auto at = [&](const Problem& p, int kv, int member) { return shares + ((long(kv) * (group - 1) + member - 1) * job.key_rows + p.key_rows) * share; };
    parallel(s.batch * s.heads, [&](int task, int worker) {
      const Problem& p = job.problems[size_t(task / s.heads)];
      const int head = task % s.heads, kv = head / group, member = head % group;
      float *mine = scratch + worker * each, *kt = mine + 2 * T * T, *vt = kt + T * s.dim;
      for (int tile = 0; tile < tiles(p.keys); tile++) {
        const long key = long(tile) * T;
        transpose(p, kv, tile, kt, vt);
        if (member == 0) head_tile(p, head, tile, kt, vt, mine, true, p.dk + kv * dk.head + key * dk.row, dk.row, p.dv + kv * dv.head + key * dv.row, dv.row);
        else {
          float* to = at(p, kv, member) + key * share;
          head_tile(p, head, tile, kt, vt, mine, true, to, share, to + s.dim, share);
        }
      }
    });
    if (group == 1) return;
    parallel(s.batch * s.kv_heads, [&](int task, int) {
      const Problem& p = job.problems[size_t(task / s.kv_heads)];
      const int kv = task % s.kv_heads;
      for (int member = 1; member < group; member++) {
        const float* from = at(p, kv, member);
        add(from, share, p.keys, s.dim, p.dk + kv * dk.head, dk.row);
        add(from + s.dim, share, p.keys, s.value_dim, p.dv + kv * dv.head, dv.row);
      }
    });
  }

  // Too few heads for the threads: tasks are key tiles, and dQ is a pass of its own over blocks of queries; seven products a tile.
  void by_tiles(float* scratch, const std::vector<Block>& blocks) const {
    struct Part { int problem, kv, tile; };
    std::vector<Part> parts;
    for (int b = 0; b < s.batch; b++)
      for (int kv = 0; kv < s.kv_heads; kv++)
        for (int tile = 0; tile < tiles(job.problems[size_t(b)].keys); tile++) parts.push_back({b, kv, tile});
    parallel(int(parts.size()), [&](int task, int worker) {
      const Part& part = parts[size_t(task)];
      const Problem& p = job.problems[size_t(part.problem)];
      float *mine = scratch + worker * each, *kt = mine + 2 * T * T, *vt = kt + T * s.dim, *own = vt + T * s.value_dim;
      const long key = long(part.tile) * T;
      const int count = std::min(T, int(p.keys - key));
      float *to_k = p.dk + part.kv * dk.head + key * dk.row, *to_v = p.dv + part.kv * dv.head + key * dv.row;
      transpose(p, part.kv, part.tile, kt, vt);
      head_tile(p, part.kv * group, part.tile, kt, vt, mine, false, to_k, dk.row, to_v, dv.row);
      for (int member = 1; member < group; member++) {
        head_tile(p, part.kv * group + member, part.tile, kt, vt, mine, false, own, share, own + s.dim, share);
        add(own, share, count, s.dim, to_k, dk.row);
        add(own + s.dim, share, count, s.value_dim, to_v, dv.row);
      }
    });
    const float *kt = job.transposed(k, s.dim, false), *vt = job.transposed(v, s.value_dim, true);
    parallel(int(blocks.size()), [&](int task, int worker) {
      const Block& at = blocks[size_t(task)];
      const Problem& p = job.problems[size_t(at.problem)];
      for (int tile = 0; tile < tiles(p.keys); tile++) {
        if (!job.visible(p, at.block, tile)) continue;
        const long panel = long(at.head / group) * job.panels + p.panels + tile;
        one(p, at.head, at.block, tile, kt + panel * s.dim * T, vt + panel * s.value_dim * T, scratch + worker * each, true, nullptr, 0, nullptr, 0);
      }
    });
  }
};

void backward_tiles(const Job& job, View q, View k, View v, View d_o, const float* logsum, const float* delta, const std::vector<Block>& blocks, Out dq, Out dk,
                    Out dv) {
  const Backward pass{job, q, k, v, d_o, logsum, delta, dq, dk, dv};
  float* scratch = kept_tiles.room(size_t(threads()) * size_t(pass.each));
  const int heads = job.s.batch * job.s.heads, rounds = (heads + threads() - 1) / threads();
  if (5 * rounds * threads() <= 7 * heads) pass.by_heads(scratch);  // the last round may leave threads without a head
  else pass.by_tiles(scratch, blocks);
}

}  // namespace

void flash_backward(const FlashShape& s, const FlashMask& m, View q, View k, View v, View o, View d_o, const float* logsum, Out dq, Out dk, Out dv) {
  Job job(s, m);
  long rows = 0;
  for (int b = 0; b < s.batch; b++) {
    Problem& p = job.problems[size_t(b)];
    p.q = q.data + job.at(q.batch, q.row, b, s.cu_q); p.k = k.data + job.at(k.batch, k.row, b, s.cu_k); p.v = v.data + job.at(v.batch, v.row, b, s.cu_k);
    p.o = o.data + job.at(o.batch, o.row, b, s.cu_q); p.d_o = d_o.data + job.at(d_o.batch, d_o.row, b, s.cu_q);
    p.dq = dq.data + job.at(dq.batch, dq.row, b, s.cu_q); p.dk = dk.data + job.at(dk.batch, dk.row, b, s.cu_k); p.dv = dv.data + job.at(dv.batch,
        dv.row, b, s.cu_k);
    p.logsum = logsum + job.sums(b);
    rows += p.queries;
  }
  float* delta = kept_delta.room(static_cast<size_t>(rows * s.heads));
  const std::vector<Block> blocks = blocks_of(job);
  parallel(int(blocks.size()), [&](int task, int) {
    const Block& at = blocks[size_t(task)];
    const Problem& p = job.problems[size_t(at.problem)];
    const long row = long(at.block) * T;
    flash().rowsum(p.o + at.head * o.head + row * o.row, o.row, p.d_o + at.head * d_o.head + row * d_o.row, d_o.row, std::min(T,
        int(p.queries - row)), s.value_dim,
                   delta + (p.logsum - logsum) + at.head * p.logsum_head + row);
    for (int r = 0; r < std::min(T, int(p.queries - row)); r++) {
      float* to = p.dq + at.head * dq.head + (row + r) * dq.row;
      std::fill(to, to + s.dim, 0.0f);
    }
  });
  backward_tiles(job, q, k, v, d_o, logsum, delta, blocks, dq, dk, dv);
}

}  // namespace lilliput
