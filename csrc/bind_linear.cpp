#include "bind.h"
#include "linear.h"
#include "pool.h"

using namespace lilliput;

void bind_linear(nb::module_& m) {
  nb::class_<Weight>(m, "Weight").def("__init__", [](Weight* w, int format, int outputs, int inputs, int group, int offset, Address data, Address scales,
                                                      Address offsets) {
    new (w) Weight{Format(format), outputs, inputs, group, Offset(offset), at<void>(data), at<void>(scales), at<void>(offsets)};
  });
  m.def("quantize", [](Address x, long x_stride, int rows, int inputs, int group, Address given, Address q, Address scales, Address sums, int stride,
                       int groups) {
    const Rows8 to{at<int8_t>(q), at<float>(scales), at<int32_t>(sums), stride, groups};
    const auto run = linear_int().quantize;
    parallel((rows + 15) / 16, [&](int task, int) {
      run(at<float>(x), x_stride, task * 16, rows < task * 16 + 16 ? rows : task * 16 + 16, inputs, group, at<float>(given), to);
    });
  }, Released());
  m.def("linear8", [](const Weight& w, Address q, Address scales, Address sums, int stride, int groups, int rows, Address bias, Address y, long y_stride,
                     bool add) {
    linear8(w, Rows8{at<int8_t>(q), at<float>(scales), at<int32_t>(sums), stride, groups}, rows, at<float>(bias), at<float>(y), y_stride, add);
  }, Released());
  m.def("linear32", [](const Weight& w, Address x, long x_stride, int rows, Address bias, Address y, long y_stride, bool add) {
    linear32(w, at<float>(x), x_stride, rows, at<float>(bias), at<float>(y), y_stride, add);
  }, Released());
}
