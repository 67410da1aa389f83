#include "bind.h"

void bind_sampler(nb::module_& m) { (void)m; }
