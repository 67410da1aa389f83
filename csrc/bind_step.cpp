#include "bind.h"

void bind_step(nb::module_& m) { (void)m; }
