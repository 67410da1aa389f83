#include "bind.h"

void bind_paged(nb::module_& m) { (void)m; }
