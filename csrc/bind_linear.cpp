#include <memory>
#include <vector>

#include "bind.h"
#include "linear.h"

using namespace lilliput;

void bind_linear(nb::module_& m) {
  nb::class_<Weight>(m, "Weight").def("__init__", [](Weight* w, int format, int outputs, int inputs, int group, int offset, Address data, Address scales,
                                                      Address offsets) {
    new (w) Weight{Format(format), outputs, inputs, group, Offset(offset), at<void>(data), at<void>(scales), at<void>(offsets)};
  });
  m.def("quantize_rows", [](Address x, int rows, int width, int group, Address given, Address q, Address scales) {
    const Weight w{W8, 0, width, group, SYMMETRIC, nullptr, nullptr, nullptr};
    std::vector<int32_t> extra(size_t(rows) * size_t(w.groups()));
    quantize8(w, at<float>(x), width, rows, at<float>(given), Rows8{at<int8_t>(q), at<float>(scales), extra.data(), width, w.groups()});
  }, Released());
  m.def("linear8", [](const Weight& w, Address x, long x_stride, int rows, Address given, Address bias, Address y, long y_stride, bool add) {
    const std::unique_ptr<char[]> space(new char[rows8_bytes(w, rows)]);
    linear8(w, at<float>(x), x_stride, rows, at<float>(given), space.get(), at<float>(bias), at<float>(y), y_stride, add);
  }, Released());
  m.def("linear32", [](const Weight& w, Address x, long x_stride, int rows, Address bias, Address y, long y_stride, bool add) {
    linear32(w, at<float>(x), x_stride, rows, at<float>(bias), at<float>(y), y_stride, add);
  }, Released());
}
