// From rows of logits to one token each: penalties, bias, grammar mask, temperature, top-k, top-p, min-p, in that order, and the
// probability of what was chosen from the same passes. No full sort: a histogram over the distance from the largest logit finds a
// threshold, and only what lies above it is ordered. Weights of the whole vocabulary are fp32 (relative error 2e-7), their sums fp64 in
// one order, so that a row's token depends on the row, its request and its random number alone.
#pragma once
#include <cstdint>

#include "isa.h"

namespace lilliput {

struct SampleRow {
  double temperature;  // 0: the largest logit, the lowest id among equals
  double top_p, min_p, repetition, presence, frequency;
  double u;            // in [0, 1)
  int top_k;           // 0: off; ties with the k-th stay
  int seen_count, bias_count;
  const int32_t* seen;        // ids that occurred in prompt or answer, each once
  const int32_t* seen_times;  // in the answer
  const int32_t* bias_ids;
  const float* bias;
  const uint32_t* mask;       // bit i of word i / 32: token i may be drawn; null: all
};

struct Sampled {
  int32_t token;  // -1: no token may be drawn
  double logprob; // of the token under the raw logits
  double total;   // log of the sum of exp of the raw logits; not finite: the row is broken
};

struct SamplerKernels {
  void (*survey)(const float* x, int count, float* largest, int32_t* at, double* total);  // of a row; total: log sum exp
  void (*weights)(const float* x, int count, float top, float scale, float* to);          // exp((x - top) * scale)
};
LILLIPUT_DISPATCH(SamplerKernels, sampler)

// tops: null or [rows][top_count] of ids and log probabilities, largest first.
void sample(const float* logits, long stride, int vocab, int rows, const SampleRow* how, Sampled* out, int top_count, int32_t* top_ids, double* top_logprobs);

}  // namespace lilliput
