#include "bind.h"
#include "pool.h"
#include "sparse.h"

using namespace lilliput;

namespace {

int pieces(int count, int least) {  // of a task, so that every thread has some and none is tiny
  const int each = (count + 4 * threads() - 1) / (4 * threads());
  return each < least ? least : each;
}

template <class F>
void split(int count, int least, F&& f) {
  const int each = pieces(count, least);
  parallel((count + each - 1) / each, [&](int task, int) {
    const int from = task * each, to = from + each < count ? from + each : count;
    f(from, to);
  });
}

}  // namespace

void bind_sparse(nb::module_& m) {
  m.def("row_dots", [](Address data, int count, int width, bool half, Address ids, int chosen, Address x, int rows, Address y) {
    const RowMatrix w{at<void>(data), count, width, half};
    split(chosen, 16, [&](int from, int to) { sparse().dots(w, at<int32_t>(ids), from, to, at<float>(x), width, rows, at<float>(y), chosen); });
  }, Released());
  m.def("row_add", [](Address data, int count, int width, bool half, Address ids, int chosen, Address a, int rows, Address y) {
    const RowMatrix w{at<void>(data), count, width, half};
    split((width + 63) / 64, 1, [&](int from, int to) {
      sparse().add(w, at<int32_t>(ids), chosen, at<float>(a), rows, from * 64, to * 64 < width ? to * 64 : width, at<float>(y));
    });
  }, Released());
  m.def("tile_product", [](int outputs, int inputs, Address starts, Address blocks, Address data, Address x, int rows, Address bias, Address y) {
    const TileMatrix w{outputs, inputs, at<int32_t>(starts), at<int32_t>(blocks), at<float>(data)};
    constexpr int TALL = 64;
    for (int r = 0; r < rows; r += TALL)
      split((outputs + 15) / 16, 1, [&](int from, int to) {
        sparse().tiles(w, at<float>(x), r, r + TALL < rows ? r + TALL : rows, from, to, at<float>(bias), at<float>(y));
      });
  }, Released());
}
