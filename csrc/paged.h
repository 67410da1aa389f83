// Attention over a paged cache: queries of many sequences packed in one batch, prompts and single tokens mixed.
// PagedAttention (Kwon et al. 2023, section 4.1) with FlashAttention-2's online softmax.
//
// The cache of one layer is `blocks` blocks of `block` tokens; a sequence's token t lies in block table[t / block], row t % block.
//     F32, F16    keys and values [block][kv_head][block tokens][head_dim]
//     I8, I4      values: per token and head, one fp16 scale and minimum;  keys: per channel over `block` = 64 tokens (see paged.cpp)
// Keys lie rotated, or before RoPE (rotate_on_read) and are rotated when read at the positions key_position gives.
#pragma once
#include <cstdint>

#include "isa.h"

namespace lilliput {

enum KvCodec : int { KV_F32 = 0, KV_F16 = 1, KV_I8 = 2, KV_I4 = 3 };

struct KvCache {          // one layer
  KvCodec codec;
  int block, kv_heads, head_dim;
  void* keys;
  void* values;
  void* key_scales;       // null for F32, F16; layout: paged.cpp
  void* value_scales;
};

struct PagedBatch {       // the same for all layers of a step
  int sequences;
  const int32_t* cu_q;    // [sequences + 1]: rows of each sequence in the packed batch
  const int32_t* lengths; // [sequences]: keys each may see, the new ones included; queries lie at the end of them
  const int32_t* tables;  // [sequences][table_stride]
  int table_stride;
};

struct PagedOptions {
  float scale;
  int window;             // 0 = none; a query sees itself and the window - 1 before it, and the first `sinks` keys
  int sinks;
  const float* cos;       // [positions][head_dim / 2] when keys lie before RoPE, else null
  const float* sin;
  float* mass;            // null, or [sequences][kv_heads][mass_stride]: attention probability of each key, summed over queries and the group
  int mass_stride;
};

// New keys and values of the packed rows into the cache, at the last cu_q[s + 1] - cu_q[s] positions of each sequence.
// k, v: [rows][kv_heads * head_dim], rows `stride` floats apart.
void paged_write(const KvCache& cache, const PagedBatch& batch, const float* k, const float* v, long stride);

// q, o: [rows][heads * head_dim], rows q_stride and o_stride floats apart.
void paged_attention(const KvCache& cache, const PagedBatch& batch, const PagedOptions& options, int heads, const float* q, long q_stride, float* o, long o_stride);

}  // namespace lilliput
