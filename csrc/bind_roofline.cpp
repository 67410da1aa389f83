#include "bind.h"

void bind_roofline(nb::module_& m) { (void)m; }
