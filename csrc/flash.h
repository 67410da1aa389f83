// FlashAttention-2, forward and backward, fp32, on queries, keys and values with any strides (the last dimension contiguous).
//
//     forward    a task is a block of 64 queries of one head; keys pass in tiles of 64 with a running maximum and sum, the division
//                comes once at the end; what is kept is O and L = m + log l. Tiles that the mask hides whole are skipped.
//     backward   P = exp(S - L) is computed again tile by tile; dV += P^T dO, dS = P (dO V^T - rowsum(dO O)), dK += dS^T Q, dQ += dS K.
//                Every sum runs over tiles in rising order: no atomics, the same bits for any number of threads.
//
// The forward pass has two more forms (E.T.), which take the softmax once over whole rows instead of tile by tile:
//     STRIP      on the fly: 16 queries at a time, their scores with every key stay in the cache: 64 bytes a key
//     PARTIAL    all scores go to memory by full tiles (S^2), then 16 queries at a time read them
//
// Dao 2023, arXiv 2307.08691, algorithms 1 and 2; Chen et al. 2021 (E.T.), doi 10.1145/3458817.3476138, section 3.
#pragma once
#include <cstdint>

#include "isa.h"

namespace lilliput {

constexpr int FLASH_TILE = 64;  // queries and keys of a tile
constexpr int STRIP_ROWS = 16;
// How a sequence's forward pass runs: by its own number of keys, never by its company's. 0: all TILED.
struct FlashForm { int strip_keys; bool partial; };  // STRIP up to so many keys; partial: PARTIAL whatever the length

struct FlashMask {
  bool causal;            // queries lie at the end of the keys
  int window, sinks;      // 0 = none; with a window a query sees itself, window - 1 keys before it, and the first `sinks`
  float scale;
  const float* slopes;    // ALiBi, [heads]: slope * (key - query) is added to scores; or null
};

struct View { const float* data; long batch, head, row; };  // address of (0, 0, 0, 0) and strides in floats
struct Out { float* data; long batch, head, row; };

struct FlashShape {
  int batch, heads, kv_heads, dim, value_dim;
  int queries, keys;          // of each, dense; the longest, packed
  const int32_t* cu_q;        // packed sequences (batch of them): rows cu[s]..cu[s+1]; null: dense
  const int32_t* cu_k;
};

// logsum: [batch][heads][queries] dense, [heads][rows] packed.
void flash_forward(const FlashShape& s, const FlashMask& m, View q, View k, View v, Out o, float* logsum, FlashForm form);
void flash_backward(const FlashShape& s, const FlashMask& m, View q, View k, View v, View o, View d_o, const float* logsum, Out dq, Out dk, Out dv);

// Bytes of scratch that stay with the calling thread for `flash_forward`: (rows of scores that every worker has, all scores in memory).
struct FlashScratch { long rows, scores; };
FlashScratch flash_scratch();

struct FlashTile {             // one block of queries against one tile of keys, of one head
  int rows, keys;              // valid ones
  int first_query, first_key;  // positions, counted so that equal ones are the same token
  int dim, value_dim;
  FlashMask mask;
  float slope;
  const float* q; long q_row;
  const float* kt;             // [dim][64]
  const float* vt;             // backward: [value_dim][64]
  const float* k; long k_row;  // backward
  const float* v; long v_row;  // forward
};

struct FlashKernels {
  void (*transpose)(const float* x, long row, int count, int dim, float* to);  // [count][dim] -> [dim][64], padded with zeros
  // s: scratch [64][64]. m, l: [rows], o: [rows][value_dim], running.
  void (*forward)(const FlashTile& t, float* s, float* m, float* l, float* o);
  void (*scores)(const FlashTile& t, float* s);  // s [rows][64], what causality hides apart
  // Whole rows over `count` tiles, whose scores lie `step` floats apart.
  void (*strip)(const FlashTile* tiles, int count, float* s, long step, float* m, float* l, float* o);
  void (*finish)(const float* m, const float* l, const float* o, int rows, int value_dim, float* to, long to_row, float* logsum);
  void (*rowsum)(const float* o, long o_row, const float* d_o, long do_row, int rows, int value_dim, float* delta);
  // p, ds: scratch [64][64]. Null dq, or null dk and dv: not wanted.
  void (*backward)(const FlashTile& t, const float* d_o, long do_row, const float* logsum, const float* delta, float* p, float* ds, float* dq,
      long dq_row, float* dk,
                   long dk_row, float* dv, long dv_row);
};
LILLIPUT_DISPATCH(FlashKernels, flash)

}  // namespace lilliput
