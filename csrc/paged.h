// Attention over a paged cache: queries of many sequences packed in one batch, prompts and single tokens mixed.
// PagedAttention (Kwon et al. 2023, section 4.1) with FlashAttention-2's online softmax.
//
// The cache of one layer is `blocks` blocks of `block` tokens (a multiple of 16); token t of a sequence lies in block table[t / block],
// row t % block. Keys lie with 16 tokens side by side, so that one vector load gives one dimension of 16 keys and no sum runs across
// lanes, in prompts and in decoding alike; values lie token by token.
//     keys    [block][kv_head][block / 16][head_dim][16]      values  [block][kv_head][block tokens][head_dim]
//     F32, F16: numbers.  I8, I4: see the codec's lines in kernels/paged.cpp; a token and head has one fp16 scale and minimum, for keys and
//     for values: [block][kv_head][block tokens][2]
// Keys lie rotated, or before RoPE and are rotated when read.
//
// Every query walks the keys of its sequence in segments of 256, each in tiles of 64, at borders that depend on positions alone, and
// segments are merged in rising order. So its result is bit-equal in any batch, in any chunk of its prompt, for any number of threads.
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
  void* key_scales;       // null for F32, F16
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
  const float* cos;       // [positions / 16][head_dim / 2][16] when keys lie before RoPE, else null
  const float* sin;
  float* mass;            // null, or [sequences][kv_heads][mass_stride]: attention probability of each key, summed over queries and the group
  int mass_stride;
};

// New keys and values of the packed rows into the cache, at the last cu_q[s + 1] - cu_q[s] positions of each sequence.
// k, v: [rows][kv_heads * head_dim], rows `stride` floats apart.
void paged_write(const KvCache& cache, const PagedBatch& batch, const float* k, const float* v, long stride);
// One row of them. Rows of one sequence may not be written by two threads at once with 4-bit keys: two tokens share a byte.
void paged_write_row(const KvCache& cache, const PagedBatch& batch, int row, const float* k, const float* v);

// q, o: [rows][heads * head_dim], rows q_stride and o_stride floats apart.
void paged_attention(const KvCache& cache, const PagedBatch& batch, const PagedOptions& options, int heads, const float* q, long q_stride, float* o,
    long o_stride);

constexpr int SEGMENT = 256, KEY_TILE = 64;

struct PagedTask {        // queries of one sequence that share a kv head, over one segment of its keys
  const KvCache* cache;
  const PagedOptions* options;
  const int32_t* table;
  int kv_head, rows;
  int next_head;          // whose first keys are asked for at the end; -1: none
  const float* q;         // [rows][head_dim], scaled
  const int32_t* limit;   // [rows]: keys each row may see
  float* m;               // [rows]: running maximum, sum and weighted values of this segment
  float* l;
  float* o;               // [rows][head_dim]
  float* scratch;         // rows * KEY_TILE + KEY_TILE * head_dim
};

struct PagedKernels {
  void (*write)(const KvCache& cache, const int32_t* table, int position, int kv_head, const float* k, const float* v);
  void (*segment)(const PagedTask& task, int first, int last);                            // keys [first, last)
  void (*mass)(const PagedTask& task, int first, int last, float* mass);                  // m, l: of the whole row; mass[key] += probability
  void (*merge)(float* m, float* l, float* o, const float* m2, const float* l2, const float* o2, int rows, int head_dim);
  void (*finish)(const float* l, const float* o, float* to, int head_dim);               // one row: o / l, 0 where nothing was seen
  void (*scale)(const float* q, float scale, float* to, int head_dim);                    // one row
};
LILLIPUT_DISPATCH(PagedKernels, paged)

}  // namespace lilliput
