// Products that read only a part of a matrix.
//
// Rows (Deja Vu: few neurons of an MLP answer a token). The matrix lies row by row, [count][width] fp32 or fp16, one row a neuron: the
// up matrix as it is, the down matrix transposed. Panels of 16 outputs would read 15 rows too many for each one that is wanted.
//     dots   y[m][i] = x[m] . row(ids[i])          add   y[m] += sum over i, in the order of ids, of a[m][i] * row(ids[i])
//
// Tiles (E.T.: 16 x 16 tiles of a weight are pruned whole). Of each panel of 16 outputs the tiles that stay, in rising order of inputs:
//     starts [panels + 1]; blocks [tiles] = input / 16; data [tile][16 inputs][16 outputs] fp32. Inputs are a multiple of 16.
//
// Each result is one chain of sums in a fixed order: it depends on its own row of x alone.
#pragma once
#include <cstdint>

#include "isa.h"

namespace lilliput {

struct RowMatrix {
  const void* data;
  int count, width;
  bool half;
};

struct TileMatrix {
  int outputs, inputs;
  const int32_t* starts;
  const int32_t* blocks;
  const float* data;
};

struct SparseKernels {
  // ids [from, to) (null: those rows themselves) for `rows` rows of x; y: [rows][y_stride]
  void (*dots)(const RowMatrix& w, const int32_t* ids, int from, int to, const float* x, long x_stride, int rows, float* y, long y_stride);
  // columns [from, to) of the sum over all `count` ids; a: [rows][count]
  void (*add)(const RowMatrix& w, const int32_t* ids, int count, const float* a, int rows, int from, int to, float* y);
  // panels [from, to) for rows [row0, row1)
  void (*tiles)(const TileMatrix& w, const float* x, int row0, int row1, int from, int to, const float* bias, float* y);
};
LILLIPUT_DISPATCH(SparseKernels, sparse)

}  // namespace lilliput
