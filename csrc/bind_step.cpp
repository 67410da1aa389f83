#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>

#include "bind.h"
#include "step.h"

using namespace lilliput;

namespace {

Product& slot(Plan& plan, int layer, int which) {
  if (layer < 0) return which == 0 ? plan.project_in : which == 1 ? plan.project_out : plan.head;
  Layer& l = plan.layers.at(size_t(layer));
  return which == 0 ? l.qkv : which == 1 ? l.out : which == 2 ? l.up : l.down;
}

// Python's reduce(address, count) called from inside the step; an exception there ends the step after this region's sums are wrong,
// so it is kept and thrown when the step returns.
struct Hook {
  nb::object call;
  nb::object error;
  static void reduce(void* self, float* partial, long count) {
    auto& hook = *static_cast<Hook*>(self);
    nb::gil_scoped_acquire held;
    if (hook.error.is_valid()) return;
    try {
      hook.call(reinterpret_cast<Address>(partial), count);
    } catch (nb::python_error& e) {
      hook.error = nb::borrow(e.value());
      e.restore();
      PyErr_Clear();
    }
  }
};

// Layers [first, last), then the logits of `count` rows. x: null where nobody wants the hidden states.
void forward(Plan& plan, Address tokens, Address x, Address positions, int rows, int sequences, Address cu_q, Address lengths, Address tables,
             int table_stride, int first, int last, Address sampled, int count, Address logits, Address mass, int mass_stride, nb::object reduce,
             const std::vector<std::tuple<int, int, const Adapter*>>& adapted) {
  const PagedBatch paged{sequences, at<int32_t>(cu_q), at<int32_t>(lengths), at<int32_t>(tables), table_stride};
  std::vector<Adapted> segments;
  for (const auto& [row0, row1, adapter] : adapted) segments.push_back({row0, row1, adapter});
  const Batch batch{rows, at<int32_t>(positions), paged, at<float>(mass), mass_stride, segments.data(), int(segments.size())};
  Hook hook{reduce, nb::object()};
  {
    nb::gil_scoped_release released;
    if (!x) plan.scratch.hidden.resize(std::max(plan.scratch.hidden.size(), size_t(rows) * size_t(plan.dim)));
    float* hidden = x ? at<float>(x) : plan.scratch.hidden.data();
    plan.forward(batch, at<int32_t>(tokens), hidden, first, last, reduce.is_none() ? nullptr : Hook::reduce, &hook);
    plan.logits(hidden, at<int32_t>(sampled), count, at<float>(logits));
  }
  if (hook.error.is_valid()) {
    PyErr_SetObject(reinterpret_cast<PyObject*>(Py_TYPE(hook.error.ptr())), hook.error.ptr());
    throw nb::python_error();
  }
}

}  // namespace

void bind_step(nb::module_& m) {
  m.def("round8", [](Address x, Address y, int rows, int width) {
    for (long r = 0; r < rows; r++) step().round8(at<float>(x) + r * width, at<float>(y) + r * width, width);
  });
  nb::class_<Adapter>(m, "Adapter")
      .def("__init__", [](Adapter* a, int layers) { new (a) Adapter(); a->layers.resize(size_t(layers)); })
      .def("put", [](Adapter& a, int layer, int slot, Address data, int count, int width, bool half, const std::vector<std::tuple<Weight, int, int>>& parts) {
        Delta& delta = a.layers.at(size_t(layer)).at(size_t(slot));
        delta.a = {at<void>(data), count, width, half};
        delta.parts.clear();
        for (const auto& [b, from, to] : parts) delta.parts.push_back({b, from, to});
      });
  m.def("low_rank", [](const std::vector<std::tuple<int, int, const Adapter*>>& adapted, Address x, long x_stride, Address y, long y_stride) {
    std::vector<Segment> segments;
    std::vector<float> scratch;
    for (const auto& [row0, row1, adapter] : adapted) segments.push_back({row0, row1, &adapter->layers.at(0)[0]});
    low_rank(segments, at<float>(x), x_stride, at<float>(y), y_stride, scratch);
  }, Released());
  nb::class_<Plan>(m, "Plan")
      .def("__init__", [](Plan* p, int dim, int heads, int kv_heads, int head_dim, int ffn, int vocab, int wide, int act, float scale) {
        new (p) Plan();
        p->dim = dim; p->heads = heads; p->kv_heads = kv_heads; p->head_dim = head_dim; p->ffn = ffn; p->vocab = vocab; p->wide = wide;
        p->act = Act(act); p->scale = scale;
      })
      .def("rope", [](Plan& p, Address cos, Address sin) { p.cos = at<float>(cos); p.sin = at<float>(sin); })
      .def("rotate_on_read", [](Plan& p, Address cos, Address sin) { p.key_cos = at<float>(cos); p.key_sin = at<float>(sin); })
      .def("scratch", [](const Plan& p) { return p.scratch.bytes(); })
      .def("clock", [](Plan& p, Address seconds) { p.clock = at<double>(seconds); })
      .def("learned", [](Plan& p, Address table) { p.learned = at<float>(table); })
      .def("embed", [](Plan& p, const Weight& w) { p.embed = w; })
      .def("add_layer", [](Plan& p, std::vector<int> regions, int window, int sinks) {
        Layer layer;
        layer.regions = std::move(regions);
        layer.window = window; layer.sinks = sinks;
        p.layers.push_back(std::move(layer));
      })
      .def("product", [](Plan& p, int layer, int which, const Weight& w, Address bias, bool int8, Address scales, bool float8) {
        slot(p, layer, which) = Product{w, at<float>(bias), int8, at<float>(scales), float8};
      })
      .def("norm", [](Plan& p, int layer, int which, int kind, Address weight, Address bias, float eps) {
        Norm& n = layer < 0 ? p.norm : which == 0 ? p.layers.at(size_t(layer)).input_norm : p.layers.at(size_t(layer)).mlp_norm;
        n.kind = NormKind(kind); n.weight = at<float>(weight); n.bias = at<float>(bias); n.eps = eps;
      })
      .def("head_norms", [](Plan& p, int layer, Address q, Address k, float eps) {
        Layer& l = p.layers.at(size_t(layer));
        l.q_norm = at<float>(q); l.k_norm = at<float>(k); l.qk_eps = eps;
      })
      .def("cache", [](Plan& p, int layer, const KvCache& cache) { p.layers.at(size_t(layer)).cache = cache; })
      .def("forward", &forward, nb::arg("tokens"), nb::arg("x"), nb::arg("positions"), nb::arg("rows"), nb::arg("sequences"), nb::arg("cu_q"),
           nb::arg("lengths"), nb::arg("tables"), nb::arg("table_stride"), nb::arg("first"), nb::arg("last"), nb::arg("sampled"), nb::arg("count"),
           nb::arg("logits"), nb::arg("mass"), nb::arg("mass_stride"), nb::arg("reduce").none(), nb::arg("adapted"));
}
