#include "bind.h"

void bind_fused(nb::module_& m) { (void)m; }
