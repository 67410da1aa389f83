#include "sampler.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "pool.h"

namespace lilliput {
namespace {

constexpr int BINS = 2048;
constexpr float PER_UNIT = 64;  // bins a unit of logit: the last bin holds all that is 32 below the largest

struct Candidate { int32_t id; double value; };  // value: logit / temperature

struct Row {
  std::vector<float> changed;
  std::vector<Candidate> candidates;
  std::vector<double> cumulative;
  std::vector<float> weights;
};

int bin_of(float x, float top) { return int(std::min(float(BINS - 1), std::max(0.0f, (top - x) * PER_UNIT))); }

// The logits after penalties, bias and mask; the row itself when nothing changes it.
const float* changed(const float* x, int vocab, const SampleRow& how, Row& row) {
  const bool penalised = how.seen_count && (how.repetition != 1 || how.presence != 0 || how.frequency != 0);
  if (!penalised && !how.bias_count && !how.mask) return x;
  row.changed.assign(x, x + vocab);
  float* y = row.changed.data();
  if (penalised)
    for (int i = 0; i < how.seen_count; i++) {
      float& v = y[how.seen[i]];
      if (how.repetition != 1) v = float(v > 0 ? v / float(how.repetition) : v * float(how.repetition));
      if (how.seen_times[i]) v -= float(how.presence) + float(how.frequency) * float(how.seen_times[i]);
    }
  for (int i = 0; i < how.bias_count; i++) y[how.bias_ids[i]] += how.bias[i];
  if (how.mask)
    for (int i = 0; i < vocab; i++) if (!(how.mask[i / 32] >> (i % 32) & 1)) y[i] = -std::numeric_limits<float>::infinity();
  return y;
}

// exp((x - top) / temperature) of the whole row, 0 for what is forbidden; their sum.
double weigh(const float* x, int vocab, float top, double temperature, std::vector<float>& to) {
  to.resize(size_t(vocab));
  sampler().weights(x, vocab, top, float(1 / temperature), to.data());
  double whole = 0;
  for (int i = 0; i < vocab; i++) {
    if (x[i] == -std::numeric_limits<float>::infinity()) to[size_t(i)] = 0;
    whole += double(to[size_t(i)]);
  }
  return whole;
}

// Ids of at least the `count` largest logits and, with weights, of at least the share `mass` of their sum `whole`: all of the first bins.
void collect(const float* x, int vocab, float top, double temperature, int count, const float* weights, double mass, double whole,
             std::vector<Candidate>& to) {
  int counts[BINS] = {};
  double masses[BINS] = {};
  for (int i = 0; i < vocab; i++) {
    if (x[i] == -std::numeric_limits<float>::infinity()) continue;
    const int b = bin_of(x[i], top);
    counts[b]++;
    if (weights) masses[b] += double(weights[i]);
  }
  int last = 0, taken = 0;
  double held = 0;
  for (; last < BINS; last++) {
    taken += counts[last];
    held += masses[last];
    if (taken >= count && held >= mass * whole) break;
  }
  to.clear();
  const float surely_less = last + 2 < BINS ? top - float(last + 2) / PER_UNIT : -std::numeric_limits<float>::infinity();
  for (int i = 0; i < vocab; i++) {
    if (x[i] < surely_less || x[i] == -std::numeric_limits<float>::infinity()) continue;
    if (bin_of(x[i], top) <= last) to.push_back({i, double(x[i]) / temperature});
  }
  std::sort(to.begin(), to.end(), [](const Candidate& a, const Candidate& b) { return a.value != b.value ? a.value > b.value : a.id < b.id; });
}

// The candidates of a row that top-k or top-p leaves, largest first (equals by rising id).
void filter(const float* x, int vocab, float top, const SampleRow& how, Row& row) {
  auto& c = row.candidates;
  const bool by_count = how.top_k > 0, by_mass = how.top_p < 1;
  if (by_count) {
    collect(x, vocab, top, how.temperature, std::min(how.top_k, vocab), nullptr, 0, 0, c);
    if (c.size() > size_t(how.top_k)) {
      size_t end = size_t(how.top_k);
      while (end < c.size() && c[end].value == c[size_t(how.top_k) - 1].value) end++;
      c.resize(end);
    }
  }
  if (by_mass) {
    double whole = 0, before = 0;
    if (by_count) for (const Candidate& one : c) whole += std::exp(one.value - c[0].value);
    else {
      whole = weigh(x, vocab, top, how.temperature, row.weights);
      collect(x, vocab, top, how.temperature, 1, row.weights.data(), how.top_p, whole, c);
    }
    size_t keep = 0;
    for (; keep < c.size() && (keep == 0 || before < how.top_p * whole); keep++) before += std::exp(c[keep].value - c[0].value);
    c.resize(keep);
  }
  if (how.min_p > 0) {
    const double least = double(top) / how.temperature + std::log(how.min_p);
    c.erase(std::remove_if(c.begin(), c.end(), [&](const Candidate& one) { return one.value < least; }), c.end());
  }
}

// Without top-k and top-p: from the whole vocabulary in its order.
int32_t draw_any(const float* x, int vocab, float top, const SampleRow& how, Row& row) {
  double whole = weigh(x, vocab, top, how.temperature, row.weights);
  float* w = row.weights.data();
  if (how.min_p > 0) {
    const double least = double(top) / how.temperature + std::log(how.min_p);
    whole = 0;
    for (int i = 0; i < vocab; i++) {
      if (double(x[i]) / how.temperature < least) w[i] = 0;
      whole += double(w[i]);
    }
  }
  double before = 0;
  int32_t found = -1;
  for (int i = 0; i < vocab; i++) {
    if (w[i] == 0) continue;
    found = i;
    before += double(w[i]);
    if (before > how.u * whole) break;
  }
  return found;
}

int32_t draw(const float* x, int vocab, const SampleRow& how, Row& row) {
  float top = -std::numeric_limits<float>::infinity();
  int32_t at = -1;
  for (int i = 0; i < vocab; i++) if (x[i] > top) { top = x[i]; at = i; }
  if (at < 0 || how.temperature == 0) return at;
  if (how.top_k == 0 && how.top_p == 1) return draw_any(x, vocab, top, how, row);
  filter(x, vocab, top, how, row);
  auto& c = row.candidates;
  const double largest = double(top) / how.temperature;
  row.cumulative.resize(c.size());
  double total = 0;
  for (size_t i = 0; i < c.size(); i++) row.cumulative[i] = total += std::exp(c[i].value - largest);
  const auto where = std::upper_bound(row.cumulative.begin(), row.cumulative.end(), how.u * total) - row.cumulative.begin();
  return c[std::min(size_t(where), c.size() - 1)].id;
}

}  // namespace

void sample(const float* logits, long stride, int vocab, int rows, const SampleRow* how, Sampled* out, int top_count, int32_t* top_ids, double* top_logprobs) {
  parallel(rows, [&](int r, int) {
    const float* raw = logits + r * stride;
    static thread_local Row row;  // its memory is used again
    float top;
    int32_t at;
    sampler().survey(raw, vocab, &top, &at, &out[r].total);
    if (!std::isfinite(out[r].total)) { out[r].token = -1; return; }
    const float* x = changed(raw, vocab, how[r], row);
    out[r].token = x == raw && how[r].temperature == 0 ? at : draw(x, vocab, how[r], row);
    out[r].logprob = out[r].token < 0 ? 0 : double(raw[out[r].token]) - out[r].total;
    if (!top_count) return;
    collect(raw, vocab, top, 1, top_count, nullptr, 0, 0, row.candidates);
    for (int i = 0; i < top_count; i++) {
      top_ids[long(r) * top_count + i] = i < int(row.candidates.size()) ? row.candidates[size_t(i)].id : -1;
      top_logprobs[long(r) * top_count + i] = i < int(row.candidates.size()) ? row.candidates[size_t(i)].value - out[r].total : -INFINITY;
    }
  });
}

}  // namespace lilliput
