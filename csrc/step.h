// A whole forward step of a decoder as ONE native call (DeepSpeed-Inference's Deep-Fusion: ops are fused into regions, so that what
// one op writes the next reads from the cache). A Plan is a decoder lowered once: each layer is a list of regions out of a table, and
// the step runs them in order over packed rows of all sequences (ByteTransformer: no padding anywhere).
//
//     pre-norm layer   QKV  ROTATE  ATTEND  OUT  UP  DOWN       norms are the first thing QKV and UP do
//     post-norm layer  QKV  ROTATE  ATTEND  OUT  NORM_1  UP  DOWN  NORM_2
//
// A variant of a region is a row of the table REGIONS (step.cpp) and a number in a layer's list. Rows: [rows][dim] fp32, contiguous.
// Memory: scratch for the largest number of rows seen, kept. A plan runs one step at a time.
// Aminabadi et al. 2022 (DeepSpeed-Inference), arXiv 2207.00032, section III.
#pragma once
#include <array>
#include <cstdint>
#include <memory>
#include <vector>

#include "linear.h"
#include "paged.h"
#include "sparse.h"

namespace lilliput {

enum NormKind : int { NO_NORM = 0, RMS_NORM = 1, LAYER_NORM = 2 };
enum Act : int { SWIGLU = 0, GELU = 1, GELU_TANH = 2, RELU = 3 };
enum Slot : int { QKV_SLOT = 0, OUT_SLOT = 1, UP_SLOT = 2, DOWN_SLOT = 3 };  // of a layer's products
enum Region : int { QKV = 0, ROTATE = 1, ATTEND = 2, OUT = 3, UP = 4, DOWN = 5, NORM_1 = 6, NORM_2 = 7 };

struct Norm {
  NormKind kind = NO_NORM;
  const float* weight = nullptr;
  const float* bias = nullptr;  // LAYER_NORM
  float eps = 0;
};

struct Product {  // y = x W^T + b; int8: rows are quantised first
  Weight weight{};
  const float* bias = nullptr;
  bool int8 = false;
  const float* scales = nullptr;  // of int8 rows, [groups]: static; null: of each row anew
  bool float8 = false;            // rows are rounded to e4m3 first
  explicit operator bool() const { return weight.data != nullptr; }
};

struct Layer {
  std::vector<int> regions;
  Norm input_norm, mlp_norm;
  Product qkv, out, up, down;     // up: gate and up stacked for SWIGLU
  const float* q_norm = nullptr;  // RMS over head_dim, before RoPE
  const float* k_norm = nullptr;
  float qk_eps = 0;
  int window = 0, sinks = 0;
  KvCache cache{};
};

// A low-rank update of one product (LoRA): y += (x A^T) B^T. `a` holds the A of all parts of a stacked product (q, k, v; gate, up) one
// below the other, row by row: a panel of 16 would be half empty at rank 8. Each part's B reads its columns of x A^T and writes its own
// outputs. fp32 or fp16; the scale is in B.
struct Delta {
  struct Part {
    Weight b;
    int from, to;  // first column of x A^T, first output
  };
  RowMatrix a{};
  std::vector<Part> parts;
};

struct Segment {  // rows [row0, row1) that get an update
  int row0, row1;
  const Delta* delta;
};

// y += the update of each segment's rows. scratch grows to x A^T of all.
void low_rank(const std::vector<Segment>& segments, const float* x, long x_stride, float* y, long y_stride, std::vector<float>& scratch);

struct Adapter {
  std::vector<std::array<Delta, 4>> layers;  // by Slot
};

struct Adapted {  // rows [row0, row1) of a batch
  int row0, row1;
  const Adapter* adapter;
};

// What a tensor-parallel runner does with a partial sum [rows][dim] before it is added to the residual; may be null.
using Reduce = void (*)(void* context, float* partial, long count);

struct Batch {
  int rows;
  const int32_t* positions;  // [rows]
  PagedBatch paged;
  float* mass = nullptr;     // null, or [layers][sequences][kv_heads][mass_stride]: attention probabilities of the keys are added (paged.h)
  int mass_stride = 0;
  const Adapted* adapted = nullptr;  // rows that get updates; every other row is the model's own
  int adapted_count = 0;
};

struct KernelsOfStep {
  void (*norm)(const Norm& norm, const float* x, float* y, int rows, int dim);
  void (*head_norm)(const float* weight, float eps, float* x, int heads, int head_dim);                        // in place, one row
  void (*rotate)(const float* cos, const float* sin, float* x, int heads, int head_dim);                        // in place, one row
  void (*act)(Act act, const float* up, float* y, int width);  // one row; SWIGLU: up = gate [width] then up [width]
  void (*add)(const float* x, float* y, long count);           // y += x
  void (*round8)(const float* x, float* y, int width);         // one row: e4m3 times a power of two of its own
};
LILLIPUT_DISPATCH(KernelsOfStep, step)

struct Plan {
  int dim = 0, heads = 0, kv_heads = 0, head_dim = 0, ffn = 0, vocab = 0, wide = 0;
  Act act = SWIGLU;
  float scale = 0;
  const float* cos = nullptr;        // [positions][head_dim / 2]; null: no RoPE
  const float* sin = nullptr;
  const float* key_cos = nullptr;    // the same as tiles (paged.h) when keys lie before RoPE and are rotated when read; else null
  const float* key_sin = nullptr;
  const float* learned = nullptr;    // [positions][dim]: learned positions
  Weight embed{};
  Product project_in, project_out, head;
  Norm norm;
  std::vector<Layer> layers;
  double* clock = nullptr;           // null, or [8]: seconds of each Region are added (benchmarks; nothing is timed without it)

  // Hidden states of `batch` through layers [first, last), in place. tokens: embedded into x first when not null.
  void forward(const Batch& batch, const int32_t* tokens, float* x, int first, int last, Reduce reduce, void* context);
  // Final norm and head of some rows of x: logits [count][vocab].
  void logits(const float* x, const int32_t* sampled, int count, float* out);

  // Scratch of the step that runs; a region reads and writes these.
  struct Scratch {
    std::vector<float> normed, wide, hidden, qkv, attended, up, acted, partial, rounded, low;
    std::vector<char> rows8;
    size_t bytes() const {
      size_t floats = 0;
      for (const auto* v : {&normed, &wide, &hidden, &qkv, &attended, &up, &acted, &partial, &rounded, &low}) floats += v->size();
      return floats * sizeof(float) + rows8.size();
    }
  } scratch;

  void product(const Product& p, const float* x, long x_stride, int rows, float* y, long y_stride, bool add);
  void update(const Batch& batch, const Layer& layer, Slot slot, const float* x, long x_stride, float* y, long y_stride);
  void residual(const Product& p, const float* x, long x_stride, int rows, float* residual, Reduce reduce, void* context);
};

void weight_row(const Weight& w, int row, float* out);  // one row of a packed matrix as fp32: embeddings

}  // namespace lilliput
