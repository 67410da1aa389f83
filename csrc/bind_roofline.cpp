#include <nanobind/stl/tuple.h>

#include <chrono>
#include <tuple>

#include "bind.h"
#include "pool.h"
#include "roofline.h"

using namespace lilliput;

namespace {

template <class F>
double seconds(F&& f) {
  const auto start = std::chrono::steady_clock::now();
  f();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

volatile float sink;

}  // namespace

void bind_roofline(nb::module_& m) {
  // Each gives a rate of one pass over all threads: bytes, flops, integer operations a second.
  m.def("read_rate", [](Address x, long count) {
    const int parts = 8 * threads();
    const auto& k = roofline();
    const double took = seconds([&] { parallel(parts, [&](int i, int) { sink = k.read(at<float>(x) + count * i / parts, count * (i + 1) / parts - count * i / parts); }); });
    return 4.0 * double(count) / took;
  }, Released());
  m.def("fma_rate", [](long rounds) {
    const auto& k = roofline();
    const double took = seconds([&] { parallel(threads(), [&](int, int) { sink = k.multiply(rounds); }); });
    return double(rounds) * 12 * k.lanes * 2 * threads() / took;
  }, Released());
  m.def("int8_rate", [](long rounds) {
    const auto& k = roofline();
    const double took = seconds([&] { parallel(threads(), [&](int, int) { sink = float(k.dot(rounds)); }); });
    return double(rounds) * 8 * k.bytes * 2 * threads() / took;
  }, Released());
}
