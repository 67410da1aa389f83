#include "bind.h"
#include "fused.h"
#include "pool.h"

using namespace lilliput;

namespace {

constexpr long TASK = 1 << 14;  // numbers of one task: 64 KiB in and out

template <class F>
void each_row(int rows, int width, F&& f) {
  const int chunk = width < TASK ? int(TASK / (width ? width : 1)) : 1;
  parallel((rows + chunk - 1) / chunk, [&](int task, int) {
    for (int r = task * chunk; r < rows && r < (task + 1) * chunk; r++) f(r);
  });
}

}  // namespace

void bind_fused(nb::module_& m) {
  m.def("bias_gelu", [](Address x, int rows, int width, Address bias, bool tanh) {
    each_row(rows, width, [&](int r) { fused().bias_gelu(tanh, at<float>(bias), at<float>(x) + long(r) * width, width); });
  }, Released());
  m.def("residual_norm", [](Address x, Address residual, Address y, int rows, int width, Address bias, Address weight, Address beta, float eps) {
    const NormAfter n{at<float>(bias), at<float>(weight), at<float>(beta), eps};
    each_row(rows, width, [&](int r) {
      const long from = long(r) * width;
      fused().residual_norm(n, at<float>(x) + from, at<float>(residual) + from, at<float>(y) + from, width);
    });
  }, Released());
}
