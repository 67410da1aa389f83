#include "bind.h"

void bind_strip(nb::module_& m) { (void)m; }
