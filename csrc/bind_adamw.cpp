#include "adamw.h"
#include "bind.h"
#include "pool.h"

using namespace lilliput;

namespace {
constexpr long TILE = 4096;
}  // namespace

void bind_adamw(nb::module_& m) {
  m.def("adamw", [](Address weight, Address gradient, Address first, Address second, long count, bool bf16, float lr, float beta1, float beta2, float eps, float decay,
                    float correction1, float root2, uint64_t key) {
    const AdamwStep s{lr, beta1, beta2, eps, decay, correction1, root2, key};
    parallel_ranges(count, TILE, [&](long from, long to) {
      const long n = to - from;
      if (bf16) adamw().bf16(s, at<uint16_t>(weight) + from, at<uint16_t>(gradient) + from, at<float>(first) + from, at<float>(second) + from, from, n);
      else adamw().fp32(s, at<float>(weight) + from, at<float>(gradient) + from, at<float>(first) + from, at<float>(second) + from, n);
    });
  }, Released());
  m.def("adamw_master", [](Address weight, Address gradient, bool wide, Address first, Address second, Address copy, bool ahead, long count, float scale, float lr,
                           float beta1, float beta2, float eps, float decay, float correction1, float root2) {
    const AdamwStep s{lr, beta1, beta2, eps, decay, correction1, root2, 0};
    parallel_ranges(count, TILE, [&](long from, long to) {
      adamw().master(s, scale, at<float>(weight) + from, at<char>(gradient) + from * (wide ? 4 : 2), wide, at<float>(first) + from, at<float>(second) + from,
                     at<uint16_t>(copy) + from, ahead, to - from);
    });
  }, Released());
}
