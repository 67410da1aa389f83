#include <nanobind/stl/tuple.h>

#include <tuple>

#include "bind.h"
#include "flash.h"

using namespace lilliput;

namespace {

using Strided = std::tuple<Address, long, long, long>;  // address, strides of batch, head and row

View view(const Strided& s) { return {at<float>(std::get<0>(s)), std::get<1>(s), std::get<2>(s), std::get<3>(s)}; }
Out out(const Strided& s) { return {at<float>(std::get<0>(s)), std::get<1>(s), std::get<2>(s), std::get<3>(s)}; }

}  // namespace

void bind_flash(nb::module_& m) {
  nb::class_<FlashShape>(m, "FlashShape").def("__init__", [](FlashShape* s, int batch, int heads, int kv_heads, int dim, int value_dim, int queries, int keys,
                                                              Address cu_q, Address cu_k) {
    new (s) FlashShape{batch, heads, kv_heads, dim, value_dim, queries, keys, at<int32_t>(cu_q), at<int32_t>(cu_k)};
  });
  nb::class_<FlashMask>(m, "FlashMask").def("__init__", [](FlashMask* s, bool causal, int window, int sinks, float scale, Address slopes) {
    new (s) FlashMask{causal, window, sinks, scale, at<float>(slopes)};
  });
  m.def("flash_forward", [](const FlashShape& s, const FlashMask& mask, Strided q, Strided k, Strided v, Strided o, Address logsum, int strip_keys, bool partial) {
    flash_forward(s, mask, view(q), view(k), view(v), out(o), at<float>(logsum), FlashForm{strip_keys, partial});
  }, Released());
  m.def("flash_scratch", [] { const FlashScratch s = flash_scratch(); return std::make_tuple(s.rows, s.scores); });
  m.def("flash_backward", [](const FlashShape& s, const FlashMask& mask, Strided q, Strided k, Strided v, Strided o, Strided d_o, Address logsum, Strided dq,
                             Strided dk, Strided dv) {
    flash_backward(s, mask, view(q), view(k), view(v), view(o), view(d_o), at<float>(logsum), out(dq), out(dk), out(dv));
  }, Released());
}
