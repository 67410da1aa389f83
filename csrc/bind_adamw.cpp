#include "bind.h"

void bind_adamw(nb::module_& m) { (void)m; }
