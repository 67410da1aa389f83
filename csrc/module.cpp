// The Python module lilliput.ops._native: one bind function a kernel family.
#include "bind.h"
#include "isa.h"
#include "pool.h"

void bind_adamw(nb::module_& m);
void bind_flash(nb::module_& m);
void bind_frozen(nb::module_& m);
void bind_fused(nb::module_& m);
void bind_linear(nb::module_& m);
void bind_paged(nb::module_& m);
void bind_pages(nb::module_& m);
void bind_roofline(nb::module_& m);
void bind_sampler(nb::module_& m);
void bind_sparse(nb::module_& m);
void bind_step(nb::module_& m);

NB_MODULE(_native, m) {
  nb::set_leak_warnings(false);  // plans that live until the interpreter ends are no fault
  m.attr("SCALAR") = int(lilliput::SCALAR);
  m.attr("AVX2") = int(lilliput::AVX2);
  m.attr("AVX512") = int(lilliput::AVX512);
  m.def("level", [] { return int(lilliput::level()); });
  m.def("best_level", [] { return int(lilliput::best_level()); });
  m.def("set_level", &lilliput::set_level);
  m.def("threads", &lilliput::threads);
  m.def("set_threads", &lilliput::set_threads, nb::arg("count"), Released());
  m.def("pool_regions", [](int regions, int tasks) {  // what an empty region costs: benchmarks
    int counted = 0;
    for (int r = 0; r < regions; r++) lilliput::parallel(tasks, [&](int, int) { __atomic_fetch_add(&counted, 1, __ATOMIC_RELAXED); });
    return counted;
  }, Released());
  bind_adamw(m); bind_flash(m); bind_frozen(m); bind_fused(m); bind_linear(m); bind_paged(m); bind_pages(m);
  bind_roofline(m); bind_sampler(m); bind_sparse(m); bind_step(m);
}
