#include "adamw.h"
#include "bind.h"
#include "pool.h"

using namespace lilliput;

namespace {
constexpr long TILE = 4096;
}

void bind_adamw(nb::module_& m) {
  m.def("adamw", [](Address weight, Address gradient, Address first, Address second, long count, bool bf16, float lr, float beta1, float beta2, float eps, float decay,
                    float correction1, float root2, uint64_t key) {
    const AdamwStep s{lr, beta1, beta2, eps, decay, correction1, root2, key};
    if (count == 0) return;
    const long tiles = (count + TILE - 1) / TILE, each = (tiles + 8191) / 8192;  // tiles of one task
    parallel(int((tiles + each - 1) / each), [&](int task, int) {
      const long from = task * each * TILE, end = from + each * TILE, n = (end < count ? end : count) - from;
      if (bf16) adamw().bf16(s, at<uint16_t>(weight) + from, at<uint16_t>(gradient) + from, at<float>(first) + from, at<float>(second) + from, from, n);
      else adamw().fp32(s, at<float>(weight) + from, at<float>(gradient) + from, at<float>(first) + from, at<float>(second) + from, n);
    });
  }, Released());
}
