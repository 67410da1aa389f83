// y = x W^T + b for weights packed once into panels. x is fp32 rows, or rows quantised to int8 (Rows8).
//
// Panel layout, the same for all instruction sets: 16 outputs side by side, outputs padded with zero rows to a multiple of 16.
//     F32, F16           [panel][input][16]            numbers
//     E4M3, E5M2         [panel][input][16]            bytes; scales: fp32 [panel][16], one an output
//     W8                 [panel][input / 4][16][4]     int8; scales: fp32 [panel][groups][16]
//     Q4, NF4            [panel][input / 8][16][4]     byte j of 4: low nibble = input k + j, high nibble = input k + 4 + j
//                                                      scales: fp16 [panel][groups][16]
// groups = inputs / group, or 1 when group is 0 (W8 only). An indivisible group is refused when the weight is packed.
// Q4 value of nibble n with scale s:  SYMMETRIC s (n - 8);  MINS s n + m, m fp16 in offsets;  ZEROS s (n - z), z fp16 in offsets.
//
// A row's result depends on that row and the weight alone (batch invariance): each output is one chain of sums over the inputs in
// rising order (fp32), or exact int32 sums of whole groups which are then added in rising order. No split over inputs, ever.
#pragma once
#include <cstddef>
#include <cstdint>

#include "isa.h"

namespace lilliput {

enum Format : int { F32 = 0, F16 = 1, W8 = 2, Q4 = 3, NF4 = 4, E4M3 = 5, E5M2 = 6 };
enum Offset : int { SYMMETRIC = 0, MINS = 1, ZEROS = 2 };
constexpr int PANEL = 16;

struct Weight {
  Format format;
  int outputs, inputs, group;
  Offset offset;
  const void* data;
  const void* scales;   // null for F32, F16
  const void* offsets;  // null unless MINS or ZEROS
  int panels() const { return (outputs + PANEL - 1) / PANEL; }
  int groups() const { return group ? inputs / group : 1; }
};

// Rows quantised for one weight: q = round(x / scale), clamped to +-127. scale: max|x| / 127 over the group (over the row when
// group is 0), or `given` [groups], the same for every row (static, from calibration).
struct Rows8 {
  int8_t* q;       // [rows][stride], stride = inputs rounded up to 64, padded with zeros; 64-byte aligned
  float* scales;   // [rows][groups]
  int32_t* extra;  // [rows][groups], of the sum of q. SYMMETRIC: what the exact sum begins with; else the bits of scale * sum, for offsets
  int stride, groups;
};

// Outputs of panels [panel0, panel1) for rows [row0, row1). y is the address of row 0, output 0; bias may be null; add: y += instead of y =.
struct IntKernels {
  void (*quantize)(const Weight& w, const float* x, long x_stride, int row0, int row1, const float* given, const Rows8& to);
  void (*tile)(const Weight& w, const Rows8& x, int row0, int row1, int panel0, int panel1, const float* bias, float* y, long y_stride, bool add);
};
struct FloatKernels {
  void (*tile)(const Weight& w, const float* x, long x_stride, int row0, int row1, int panel0, int panel1, const float* bias, float* y,
      long y_stride, bool add);
};
LILLIPUT_DISPATCH(IntKernels, linear_int)      // formats W8, Q4
LILLIPUT_DISPATCH(FloatKernels, linear_float)  // every format: weights are widened to fp32, x stays fp32

// Whole products, tiled over the pool (linear.cpp). linear8 quantises the rows first, into `space` of rows8_bytes(w, rows).
void quantize8(const Weight& w, const float* x, long x_stride, int rows, const float* given, const Rows8& to);
size_t rows8_bytes(const Weight& w, int rows);
void linear8(const Weight& w, const float* x, long x_stride, int rows, const float* given, void* space, const float* bias, float* y, long y_stride, bool add);
void linear32(const Weight& w, const float* x, long x_stride, int rows, const float* bias, float* y, long y_stride, bool add);

}  // namespace lilliput
